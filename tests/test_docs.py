"How the docs site shows a name: `fastdistill._docs`, and the script that finishes the built pages."
import runpy
from pathlib import Path
import pytest
pytest.importorskip('nbdev.showdoc')
from fastdistill._docs import Renderer, signature_of, width
from fastdistill.all import *
from fastdistill.cli import fastdistill as command
from fastdistill.digits import DigitImage
from fastdistill.losses.base import Loss
from fastdistill.messages import more

script = runpy.run_path(str(Path(__file__).parents[1]/'.ci/finish.py'))
finish,unlinked,home = (script[o] for o in ('finish','unlinked','home'))

def text(o): return Renderer(o)._repr_markdown_()
def rows(o): return [[c.strip() for c in l.replace(r'\|', '¦').strip('|').split('|')] for l in text(o).splitlines() if l.startswith('|')]

def f(
    x, # The first, `a|b`
    y:'int|str'='a', # The second
    *args,
    z=None, # The third
) -> list: # What comes back
    "One line"

def test_a_table_of_parameters():
    assert rows(f) == [['parameter','type','default','meaning'], ['-'*n for n in (18,14,12,56)], ['<code>x</code>','','','The first, `a¦b`'], ['<code>y</code>','`int or str`',"`'a'`",'The second'],
                       ['<code>args</code>','','',''], ['<code>z</code>','','`None`','The third'], ['**returns**','`list`','','What comes back']]
    assert "f(x, y='a', *args, z=None)" in text(f) and '\n\nOne line\n\n' in text(f)

def test_comments_on_starred_parameters():
    def g(
        *args, # Of the loss
        **kwargs, # Of `Learner`
    ) -> list:
        "One line"
        return [*args, *kwargs]     # a comment in the code
    assert [r[-1] for r in rows(g)[2:]] == ['Of the loss','Of `Learner`']

def test_columns_that_would_be_empty_are_left_out():
    def g(a): "Nothing to explain"
    def h(
        a, # Explained
    ): "One"
    assert rows(g) == [] and rows(h)[0] == ['parameter','meaning']

@pytest.mark.parametrize('o', [KnowledgeDistillationCallback, record_teacher, command, find_student])
def test_signatures_fit_beside_the_sidebar(o):
    lines = text(o).split('```')[1].splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= width and all(r[-1] for r in rows(o))

def test_classes_that_are_made_as_their_base_class_show_no_arguments():
    assert 'Loss()' in text(Loss) and 'ShowDistillationGraph()' in text(ShowDistillationGraph) and rows(Loss) == []
    assert 'DigitImage()' in text(DigitImage)

def test_meanings_that_the_command_keeps_in_its_types():
    assert rows(command)[2][0] == '<code>path</code>' and rows(command)[2][3].startswith('Folder')
    assert 'str <' not in text(command)

@pytest.mark.parametrize('module', ['fastdistill.fit','__main__'])     # imported, and on its page while the site is built
@pytest.mark.parametrize('name', ['ask_teacher','paused','join_optimizer'])
def test_a_wrapped_method_that_patch_put_on_its_class_is_named_with_it(name, module, monkeypatch):
    from fastdistill.fit import Fit
    method = getattr(Fit, name)
    for f in (method, getattr(method, '__wrapped__', method)): monkeypatch.setattr(f, '__module__', module)
    assert f'### Fit.{name}\n' in text(method) and '/fit.py#' in text(method)

def test_pages_load_nothing_from_other_hosts():
    page = '<head><script src="https://cdnjs.cloudflare.com/x.js" integrity="a"></script><script src="site_libs/y.js"></script></head>'
    assert finish(page) == '<head><script src="site_libs/y.js"></script></head>'

def test_pictures_are_described_by_their_captions():
    page = '<figure class="f"><p><img src="a.png" class="c"></p><figcaption>A &amp; <em>b</em></figcaption></figure>'
    assert '<img alt="A &amp; b" src="a.png"' in finish(page) and finish(finish(page)) == finish(page)
    kept = '<figure><img src="a.png" alt="mine"><figcaption>other</figcaption></figure>'
    assert finish(kept) == kept

def test_links_to_names_that_no_page_documents():
    link = f'<a href="{home()}/a.html#{{}}"><code>f</code></a>'
    places = {'a.html':{'known'}}
    assert unlinked(link.format('known'), places) == link.format('known') and unlinked(link.format('hidden'), places) == '<code>f</code>'
    assert unlinked(link.format('hidden').replace('a.html', 'b.html'), places).startswith('<a')

def test_messages_lead_to_the_published_site():
    assert more('weights') == f'\nMore: {home()}/messages.html#weights'
