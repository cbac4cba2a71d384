"""Run a tutorial in full, keep its outputs in the page, and its results for several seeds beside this script.

    python benchmarks/tutorial.py beans [seeds]        # the name of a page; writes benchmarks/beans.csv

The page is run once, as a reader would. Its cells from `seed = 0` to `results` are then run again for each further seed. The page says where it
looks for its data.
"""
import json, platform, sys
from pathlib import Path
import nbformat, pandas as pd, torch
from nbclient import NotebookClient

here = Path(__file__).parent

def cells_of(nb):
    "The page's code, without what is only shown, each cell with its place: before the students, the students, after them"
    code = [(i,c) for i,c in enumerate(nb.cells) if c.cell_type == 'code' and '#| eval: false' not in c.source]
    sources = [c.source for _,c in code]
    first,last = sources.index('seed = 0'),next(i for i,s in enumerate(sources) if s.startswith('results = '))
    return code[:first],code[first:last+1],code[last+1:]

def execute_aside(client, source):
    "Run `source` in a cell that the page does not keep, and return what it prints"
    client.nb.cells.append(nbformat.v4.new_code_cell(source))
    try: outputs = client.execute_cell(client.nb.cells[-1], len(client.nb.cells)-1).outputs
    finally: client.nb.cells.pop()
    return ''.join(o.text for o in outputs if o.output_type == 'stream' and o.name == 'stdout')

def run(name, seeds=3):
    page,csv = here.parent/f'nbs/tutorials/{name}.ipynb',here/f'{name}.csv'
    nb = nbformat.read(page, 4)
    before,students,after = cells_of(nb)
    client,rows = NotebookClient(nb, timeout=None, resources=dict(metadata=dict(path=page.parent))),[]
    with client.setup_kernel():
        for i,c in before: client.execute_cell(c, i)
        for seed in range(seeds):
            for i,c in students:
                if seed: execute_aside(client, c.source.replace('seed = 0', f'seed = {seed}'))
                else:    client.execute_cell(c, i)
            results = json.loads(execute_aside(client, 'import json; print(json.dumps(results))'))
            rows += [dict(seed=seed, method=method, **metrics) for method,metrics in results.items()]
            machine = f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}'
            pd.DataFrame(rows).assign(machine=machine).to_csv(csv, index=False, float_format='%.4f')
            print(f'{name}, seed {seed}', flush=True)
        try:
            for i,c in after: client.execute_cell(c, i)
        finally: nbformat.write(nb, page)     # a claim on the page that does not hold loses no outputs

if __name__ == '__main__': run(sys.argv[1], *map(int, sys.argv[2:]))
