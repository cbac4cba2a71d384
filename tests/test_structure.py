"How the package is built: who imports whom, how long lines, modules and classes are, what is public."
import ast, importlib, re, runpy
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace
import pytest

root = Path(__file__).resolve().parent.parent
count = SimpleNamespace(**runpy.run_path(str(root/'benchmarks/structure.py')))
sources,pages = count.modules(root),count.code_cells(root)

def module_name(file):
    "`fastdistill/losses/base.py` -> `losses.base`; a folder has the name of its `__init__.py`, the package none"
    return file.removeprefix('fastdistill/').removesuffix('.py').replace('/', '.').removesuffix('__init__').rstrip('.')

modules = {module_name(f):ast.parse(s) for f,s in sources.items()}
folders = {module_name(f) for f in sources if f.endswith('__init__.py')}

def floors():
    "The table of CONTRIBUTING.md: module -> (floor, row)"
    rows = re.findall(r'^\| (\d+) \| `([\w.]+)` \|', (root/'CONTRIBUTING.md').read_text(encoding='utf-8'), flags=re.M)
    assert len({name for _,name in rows}) == len(rows), 'a module is listed twice'
    return {name:(int(floor), i) for i,(floor,name) in enumerate(rows)}

def folder(name): return name if name in folders else name.rpartition('.')[0]

def imports(name, tree):
    "Modules of ours that a module imports, at the top or inside of a function"
    def ours(full):
        "The module that a dotted name lies in, or None"
        head,_,rest = full.partition('.')
        if head != 'fastdistill': return None
        while rest and rest not in modules: rest = rest.rpartition('.')[0]
        return rest
    def dotted(node):
        if isinstance(node, ast.Import): return [a.name for a in node.names]
        base = node.module or ''
        if node.level:
            parts = ['fastdistill', *filter(None, folder(name).split('.'))]
            base = '.'.join(filter(None, ['.'.join(parts[:len(parts)-node.level+1]), base]))
        return [f'{base}.{a.name}' for a in node.names]
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import,ast.ImportFrom))]
    return {m for n in nodes for full in dotted(n) if (m := ours(full))} - {name}

graph = {name:imports(name, tree) for name,tree in modules.items()}
hand_written = folders | {'all','__main__','_docs'}

def test_every_module_has_its_floor():
    assert not set(floors()) ^ (set(modules) - folders), 'CONTRIBUTING.md lists each module, and no other'
    assert {folder(name) for name in modules} <= folders, 'a folder without __init__.py is not installed'

def test_imports_go_down_the_floors():
    "A module imports from lower floors and, within its folder, from rows above it; a folder stands for all that it has"
    plan = floors()
    def allowed(name, other):
        (floor,row),(other_floor,other_row) = plan[name],plan[other]
        together = floor == other_floor and folder(name) == folder(other) != ''
        return other_floor < floor or together and other_row < row
    def inside(other): return [m for m in plan if folder(m) == other] if other in folders else [other]
    pairs = [(name,other) for name in plan for o in graph[name] for other in inside(o)]
    assert not [f'{name} imports {other}' for name,other in pairs if not allowed(name, other)]

def test_imports_have_no_circles(): TopologicalSorter(graph).prepare()     # raises CycleError

@pytest.mark.parametrize('name', sorted(folders-{''}))
def test_a_folder_brings_public_names_of_its_modules_only(name):
    assert graph[name] <= {m for m in modules if folder(m) == name}
    package = importlib.import_module(f'fastdistill.{name}')
    for n in package.__all__:
        assert f'{name}.{n}' not in modules, f'{n} is a module'
        o = getattr(package, n)
        if callable(o): assert o.__module__.startswith(f'fastdistill.{name}.')

@pytest.mark.parametrize('name', sorted(set(modules)-hand_written))
def test_a_module_comes_from_the_page_of_its_name(name):
    path = name.replace('.', '/')
    assert f'nbs/{path}.ipynb' in pages
    marks = set(re.findall(r'^# %% (\S+\.ipynb)', sources[f'fastdistill/{path}.py'], flags=re.M))
    assert marks == {'../'*(path.count('/')+1) + f'nbs/{path}.ipynb'}

@pytest.mark.parametrize('file', sources)
def test_no_long_lines_in_modules(file):
    assert not [f'{i}: {len(l)}' for i,l in enumerate(count.own_lines(sources[file]), 1) if len(l)>120]

@pytest.mark.parametrize('page', pages)
def test_readers_see_no_long_lines(page):
    "The site shows about 88 characters"
    assert not [l for directives,lines in pages[page] if count.is_shown(directives) for l in lines if len(l)>88]

@pytest.mark.parametrize('file', sources)
def test_no_long_modules_and_classes(file):
    assert len(sources[file].splitlines()) <= 300, 'two modules are easier to read'
    for c in ast.walk(ast.parse(sources[file])):
        if isinstance(c, ast.ClassDef): assert count.n_lines(c) <= 130, f'{c.name}: two classes are easier to read'

def private_names():
    "What the package defines for itself: functions, classes and attributes whose names start with an underscore"
    for n in (n for tree in modules.values() for n in ast.walk(tree)):
        stored = isinstance(getattr(n, 'ctx', None), ast.Store)
        if isinstance(n, (*count.FUNCTIONS,ast.ClassDef)): yield n.name
        elif isinstance(n, ast.Name) and stored: yield n.id
        elif isinstance(n, ast.Attribute) and stored and getattr(n.value, 'id', '') == 'self': yield n.attr

tests = {p.name:p.read_text(encoding='utf-8') for p in sorted((root/'tests').glob('*.py'))}
tests.pop(Path(__file__).name)

@pytest.mark.parametrize('file', tests)
def test_tests_use_public_names(file):
    "No attribute, import or patch of a private name of the package; names that the tests define are their own"
    own = {n for text in tests.values() for n in re.findall(r'\b(?:def|class) (_\w+)', text)}
    private = {n for n in private_names() if re.match(r'_[a-zA-Z]\w*[a-zA-Z0-9]$', n)} - own
    used = re.findall(r'(?:[\w)\]]\.|[\'"])(_[a-zA-Z]\w*)', tests[file])
    imports = [n for n in ast.walk(ast.parse(tests[file])) if isinstance(n, ast.ImportFrom)]
    imported = [a.name for n in imports if (n.module or '').startswith('fastdistill') for a in n.names]
    assert not private.intersection(used)
    assert not [n for n in imported if n.startswith('_')]

def test_all_has_what_a_user_types():
    from fastdistill._modidx import d
    names = {}
    exec('from fastdistill.all import *', names)
    names = {n:o for n,o in names.items() if not n.startswith('_')}
    internal = {'FeatureHooks','StopForward','TeacherModule','as_teacher','is_compiled','no_better_than_chance'}
    assert len(names) <= 50
    assert not internal & set(names)
    for n,o in names.items():
        assert callable(o), f'{n} is no function or class'
        assert o.__module__.startswith('fastdistill.') and getattr(importlib.import_module(o.__module__), n) is o
        page,_ = d['syms'][o.__module__][f'{o.__module__}.{n}']     # nbdev documents it there
        assert f"nbs/{page.partition('.html')[0]}.ipynb" in pages, f'{n} is on no page'
        assert o.__doc__, f'{n} has no docstring'

@pytest.mark.parametrize('file', sorted(p.name for p in (root/'benchmarks').glob('*.py')))
def test_benchmarks_import_what_exists(file):
    "They run for minutes to hours, so that nobody runs them after each change"
    for n in ast.walk(ast.parse((root/'benchmarks'/file).read_text(encoding='utf-8'))):
        if not isinstance(n, ast.ImportFrom) or not (n.module or '').startswith('fastdistill'): continue
        module = importlib.import_module(n.module)
        assert not [a.name for a in n.names if a.name != '*' and not hasattr(module, a.name)], f'in {n.module}'
