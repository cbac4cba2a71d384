"Runs of an experiment in a table, which several processes may fill: a run that has its row is not repeated."
import fcntl, io
from pathlib import Path
import pandas as pd

class Runs:
    "A CSV file with a row for each run; `keys` are the columns that tell which run it is"
    def __init__(self, file, *keys): self.file,self.keys = Path(file),list(keys)

    @property
    def table(self): return pd.read_csv(self.file) if self.file.exists() else pd.DataFrame(columns=self.keys)

    def has(self, **which):
        t = self.table
        return bool(len(t)) and bool(t[self.keys].eq(pd.Series(which)[self.keys]).all(axis=1).any())

    def add(self, **row):
        "Write it at once, behind the rows of other processes"
        with open(self.file, 'a+') as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            f.seek(0)
            text = f.read()
            old = pd.read_csv(io.StringIO(text)) if text else None
            if old is not None and {*row} != {*old.columns}: raise ValueError(f'{self.file} has the columns {[*old.columns]}, but the row has {[*row]}')
            pd.DataFrame([row], columns=None if old is None else old.columns).to_csv(f, index=False, header=not text, float_format='%.4f')
        print(', '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k,v in row.items()), flush=True)
