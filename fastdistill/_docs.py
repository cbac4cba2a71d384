"How the docs site shows a name of the API: signature and table of parameters; written by hand, used by nbdev alone"
import inspect, re
from textwrap import wrap
from fastcore.docments import ShowDocRenderer, docments
from nbdev.doclinks import NbdevLookup

width = 88     # characters that fit beside the sidebar

def text_of(x):
    "A type or a default, in short"
    if x is inspect.Parameter.empty: return ''
    return getattr(x, '__name__', None) or repr(x).replace('typing.', '')

def signature_of(name, sym, sig):
    "The call, broken where it is too long; types and meanings are in the table"
    params = [] if inherits_init(sym) else sig.parameters.values()
    def one(p):
        star = {p.VAR_POSITIONAL:'*', p.VAR_KEYWORD:'**'}.get(p.kind, '')
        return f'{star}{p.name}' + ('' if p.default is p.empty else f'={text_of(p.default)}')
    args = ', '.join(one(p) for p in params if p.name != 'self')
    if len(line := f'{name}({args})') <= width: return line
    lines = wrap(args, width-4, break_long_words=False, break_on_hyphens=False)
    return f'{name}(\n' + '\n'.join('    '+l for l in lines) + ')'

def inherits_init(sym):
    "Is it a class that is made as another package makes its base class, or with nothing?"
    if not inspect.isclass(sym): return False
    owner = next(c for c in sym.__mro__ if '__init__' in vars(c)).__module__.partition('.')[0]     # ours: `__main__`
    return owner in ('fastai','fasttransform','fastcore','torch','pandas','builtins')

def cell(text): return text.replace('|', r'\|').replace('\n', ' ')
def code(text): return f'`{cell(text)}`' if text else ''
def type_(text): return code(' or '.join(o.strip() for o in text.strip("'").split('|')))     # bars separate columns

def starred(sym):
    "Comments on `*args` and `**kwargs`, which fastcore does not find or takes for what comes back"
    found = re.findall(r'\*(\w+)[^#\n]*#\s*(.+)', inspect.getsource(sym.__init__ if inspect.isclass(sym) else sym))
    return dict(reversed(found))

def rows_of(sym, sig):
    "Name, type, default and meaning of each parameter, and of what comes back if that is explained"
    found = docments(sym, full=True, returns=True)
    stars = starred(sym) if any(p.kind in (p.VAR_POSITIONAL,p.VAR_KEYWORD) for p in sig.parameters.values()) else {}
    for name,p in sig.parameters.items():
        if name == 'self' or name not in found: continue
        kind,_,meaning = text_of(p.annotation).partition(' <')     # where fastcore's call_parse appends the meaning
        meaning = found[name].docment or meaning.rstrip(">'") or stars.get(name, '')
        yield f'<code>{name}</code>',type_(kind),code(text_of(p.default)),cell(meaning)
    d = found.get('return')
    if not d or not d.docment or d.docment in stars.values() or inspect.isclass(sym): return
    yield '**returns**',type_(text_of(d.anno)),'',cell(d.docment)

def table_of(sym, sig):
    "In Markdown, without columns that would be empty; nothing for a name without explained parameters"
    rows = [] if inherits_init(sym) else [*rows_of(sym, sig)]
    if not any(r[3] for r in rows): return ''
    heads = ['parameter','type','default','meaning']
    keep = [i for i in range(4) if any(r[i] for r in rows)]
    def line(cells): return '| ' + ' | '.join(cells[i] for i in keep) + ' |'
    widths = ['-'*n for n in (18,14,12,56)]     # of the columns, relative to each other
    return '\n'.join(['::: {.parameters}', '', line(heads), line(widths), *map(line, rows), '', ':::'])

class Renderer(ShowDocRenderer):
    "What `show_doc` shows"
    def __init__(self, sym, name=None, **kwargs):
        super().__init__(sym, name, **kwargs)
        if not name and hasattr(sym, '__wrapped__'):     # nbdev shows what is wrapped, which has no class after `patch`
            self.nm,self.fn = sym.__qualname__,self.fn.removesuffix(self.sym.__qualname__) + sym.__qualname__

    def _repr_markdown_(self):
        source = NbdevLookup().code(self.fn)
        link = f'[source]({source}){{.source-link target="_blank"}}\n\n' if source else ''
        sig = signature_of(self.nm, self.sym, self.sig) if self.sig else f'{self.nm}(...)'
        table = table_of(self.sym, self.sig) if self.sig else ''
        docs = '' if self.docs == 'Call self as a function.' else self.docs     # Python says so of every object
        parts = [f'{"#"*self.title_level} {self.nm}', f'```python\n{sig}\n```', docs, table]
        return f'---\n\n{link}' + '\n\n'.join(p for p in parts if p)
