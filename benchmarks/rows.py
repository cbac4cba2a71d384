"Measure some rows of a table of losses again, and leave the others as they are."
import re
import pandas as pd

def names_one_of(row, names):
    "Is the row, such as `Projected(Cosine())`, one of a loss with one of these names?"
    return any(re.search(rf'\b{name}\(', row) for name in names)

def replace_rows(old, new, names, order):
    "`old` with the rows of `new` in place of those of the losses `names`; its first row, which the others are compared with, stays"
    kept = old[~old.loss.map(lambda row: names_one_of(row, names))]
    places = {row:i for i,row in reversed([*enumerate([old.loss[0], *order])])}
    both = pd.concat([kept, new.iloc[1:]], ignore_index=True)
    return both.sort_values('loss', key=lambda rows: rows.map(lambda row: places.get(row, len(places))), kind='stable', ignore_index=True)
