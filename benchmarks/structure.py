"""How the package is built, in numbers: its classes, cells, modules, names, long lines and assertions.

    python benchmarks/structure.py                       # this checkout
    python benchmarks/structure.py ../before --markdown  # another one, for example a `git worktree` of an older commit

What is counted:
- Class: the lines from `class` to the end of its body, and its methods; "with @patch" adds the functions that patch it.
- Private attributes of the callback: each `self._x` that is not a method. `_stateattrs` is fastai's, and is left out.
- Module: all lines, as `wc -l` counts; "of code" leaves out blank lines and the `# %%` lines of nbdev.
- Exported cell: a cell with `#| export`. All its lines count, except directives (lines that start with `#|`).
- Shown cell: a code cell that the site shows (no `export`, `hide`, `default_exp`, `include: false`, `echo: false`).
- Assertions: `assert` and calls of `test_...`, in cells that are not exported; hidden cells count too.
- Long lines: all lines of modules, except the `__all__` that nbdev writes; lines of shown cells, except directives.
"""
import argparse, ast, json, os, re, subprocess, sys, textwrap
from collections import Counter, defaultdict
from pathlib import Path

FUNCTIONS = ast.FunctionDef,ast.AsyncFunctionDef
CALLBACK = 'KnowledgeDistillationCallback'

def modules(root):
    "File name -> source, without the index that nbdev writes"
    paths = sorted((root/'fastdistill').rglob('*.py'))
    return {p.relative_to(root).as_posix():p.read_text(encoding='utf-8') for p in paths if p.name != '_modidx.py'}

def code_cells(root):
    "Page -> list of code cells, each as (directives, other lines)"
    def split(cell):
        lines = ''.join(cell['source']).strip().splitlines()
        return [l for l in lines if l.startswith('#|')],[l for l in lines if not l.startswith('#|')]
    read = lambda p: json.loads(p.read_text(encoding='utf-8'))['cells']
    return {p.relative_to(root).as_posix():[split(c) for c in read(p) if c['cell_type']=='code']
            for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts}

def is_exported(directives): return any(re.match(r'#\|\s*export', d) for d in directives)

def is_shown(directives):
    hidden = r'#\|\s*(export|hide\b|default_exp|(include|echo):\s*false)'
    return not any(re.match(hidden, d) for d in directives)

def own_lines(source):
    "Lines of a module; those of nbdev's `__all__` are empty"
    return re.sub(r'^__all__ = \[[^\]]*\]', lambda m: '\n'*m[0].count('\n'), source, flags=re.M).splitlines()

def n_lines(node): return node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1

def patched(f):
    "Names of the classes that function `f` is added to by fastcore's `patch` or `patch_to`"
    for d in f.decorator_list:
        name = getattr(getattr(d, 'func', d), 'id', '')
        if name not in ('patch','patch_to'): continue
        where = d.args[0] if name=='patch_to' else f.args.args[0].annotation
        return {n.id for n in ast.walk(where) if isinstance(n, ast.Name)}
    return set()

def classes(sources):
    "Class name -> (the class, its methods, functions that patch it), as syntax trees"
    top = [node for src in sources for node in ast.parse(src).body]
    patches = defaultdict(list)
    for f in top:
        for name in patched(f) if isinstance(f, FUNCTIONS) else (): patches[name].append(f)
    methods = lambda c: [f for f in c.body if isinstance(f, FUNCTIONS)]
    return {c.name:(c, methods(c), patches[c.name]) for c in top if isinstance(c, ast.ClassDef)}

def private(cls, methods, patches):
    "Names of the private attributes of a class"
    nodes = [n for part in (cls,*patches) for n in ast.walk(part) if isinstance(n, ast.Attribute)]
    names = {n.attr for n in nodes if getattr(n.value, 'id', '')=='self' and re.match('_[a-z]', n.attr)}
    return sorted(names - {f.name for f in (*methods,*patches)} - {'_stateattrs'})

def n_assertions(lines):
    try: nodes = [*ast.walk(ast.parse('\n'.join(l for l in lines if l[:1] not in ('%','!'))))]
    except SyntaxError: return 0
    calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, 'id', '').startswith('test_')]
    return len(calls) + sum(isinstance(n, ast.Assert) for n in nodes)

def names_in_all(root):
    "What `from fastdistill.all import *` brings"
    code = 'ns = {}; exec("from fastdistill.all import *", ns); print(*sorted(n for n in ns if n[0]!="_"))'
    cmd,env = [sys.executable, '-W', 'ignore', '-c', code],{**os.environ, 'PYTHONPATH':str(root)}
    return subprocess.run(cmd, cwd=root, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.split()

def largest(rows, by=1, n=10): return sorted(rows, key=lambda row: row[by], reverse=True)[:n]

def class_table(parts):
    rows = [(name, n_lines(c), len(methods), n_lines(c)+sum(map(n_lines, patches)), len(methods)+len(patches))
            for name,(c,methods,patches) in parts.items()]
    columns = ['class','lines','methods','lines with @patch','methods with @patch']
    return 'The ten largest classes',columns,largest(rows, by=3)

def cell_table(pages):
    cells = [(page,lines) for page,cs in pages.items() for directives,lines in cs if is_exported(directives)]
    has = lambda lines: next((l for l in lines if re.match('class |def ', l)), lines[0])[:50]
    median = sorted(len(ls) for _,ls in cells)[len(cells)//2]
    title = f'The ten longest exported cells of {len(cells)} (median {median} lines)'
    return title,['page','lines','has'],largest((page,len(ls),has(ls)) for page,ls in cells)

def module_table(sources):
    of_code = lambda lines: sum(bool(l.strip()) and not l.startswith('# %%') for l in lines)
    rows = [(name,len(s.splitlines()),of_code(s.splitlines())) for name,s in sources.items()]
    large = largest([r for r in rows if r[1]>250], n=len(rows))
    return f'Modules over 250 lines, of {len(rows)}',['module','lines','of code'],large

def line_table(sources, pages):
    modules = [l for s in sources.values() for l in own_lines(s)]
    shown = [l for cs in pages.values() for directives,ls in cs if is_shown(directives) for l in ls]
    def row(where, lines, width, n): return f'over {width} in {where}',n,len(lines),f'{n/len(lines):.1%}'
    rows = [row(where, ls, w, sum(len(l)>w for l in ls))
            for where,ls,w in [('modules',modules,120),('modules',modules,140),('shown cells',shown,88)]]
    return 'Long lines',['characters','lines','of','share'],rows

def assertion_table(pages):
    asserted,exported = Counter(),Counter()
    for page,cs in pages.items():
        for directives,ls in cs:
            if is_exported(directives): exported[page] += len(ls)
            else: asserted[page] += n_assertions(ls)
    rows = [(page,asserted[page],n) for page,n in exported.items()]
    rows.append(('all of them', sum(r[1] for r in rows), sum(r[2] for r in rows)))
    columns = ['page','assertions','exported lines','ratio']
    return 'Assertions per exported line',columns,[(*r,f'{r[1]/r[2]:.2f}') for r in rows]

def name_table(title, names): return title,['number','names'],[(len(names),' '.join(names))]

def tables(root):
    "Each table as (title, columns, rows)"
    sources,pages = modules(root),code_cells(root)
    parts = classes(sources.values())
    hidden = name_table(f'Private attributes of {CALLBACK}', private(*parts[CALLBACK]))
    public = name_table('Names in fastdistill.all', names_in_all(root))
    lines,asserts = line_table(sources, pages),assertion_table(pages)
    return [class_table(parts), hidden, cell_table(pages), module_table(sources), public, lines, asserts]

def show(title, columns, rows, markdown):
    rows = [columns, *([str(v) for v in r] for r in rows)]
    if markdown:
        rows.insert(1, ['---']*len(columns))
        return '\n'.join([f'**{title}**', '', *(f"| {' | '.join(r)} |" for r in rows)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '+'  '.join(v.ljust(w) for v,w in zip(row, widths)).rstrip() for row in rows]
    fill = textwrap.TextWrapper(120, subsequent_indent=' '*10).fill
    return '\n'.join([title, *(fill(l) if len(l)>120 else l for l in lines)])

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkout', nargs='?', type=Path, default=Path(__file__).parent.parent)
    parser.add_argument('--markdown', action='store_true', help='print the tables in Markdown')
    args = parser.parse_args()
    print('\n\n'.join(show(*table, args.markdown) for table in tables(args.checkout.resolve())))
