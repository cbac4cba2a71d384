"Messages that end with the address of their section on the page of messages."
import re
from pathlib import Path
import nbformat, pytest
from fastai.losses import CrossEntropyLossFlat
from fastdistill.all import *
from fastdistill.concerns import all_concerns
from fastdistill.messages import more, page
from conftest import QuietLearner, data, net

root = Path(__file__).parents[1]

def sections():
    cells = nbformat.read(root/'nbs/messages.ipynb', 4).cells
    return [n for c in cells if c.cell_type == 'markdown' for n in re.findall(r'^### (.*)$', c.source, re.M)]

def test_each_address_has_its_section_and_each_section_a_message():
    source = '\n'.join(p.read_text(encoding='utf-8') for p in (root/'fastdistill').rglob('*.py'))
    named = set(re.findall(r'''more\(["']([\w-]+)["']\)''', source)) | set(re.findall(r'''explained\(.*, '(\w[\w-]+)'\)''', source))
    named |= {name.replace('_', '-') for name in all_concerns}
    assert len(sections()) == len(set(sections())) and named == set(sections())

def test_each_section_says_what_it_means_and_what_to_do():
    for c in nbformat.read(root/'nbs/messages.ipynb', 4).cells:
        if c.source.startswith('### '): assert re.fullmatch(r'### [\w-]+\n\n> .+\n\n.+\n\n\*\*What to do\.\*\* .+', c.source), c.source

def test_an_error_and_a_warning_in_a_fit():
    learn = QuietLearner(data(), net(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(KeyError, match=f'Nearest names.*\n?.*{re.escape(page)}#missing-layer'):
        learn.fit(1, cbs=KnowledgeDistillationCallback(net(), Attention, 'layer9', '0'))
    with pytest.warns(UserWarning, match=f'flat.*\nMore: {re.escape(page)}#flat-targets'):
        learn.fit(1, cbs=KnowledgeDistillationCallback(net(), SoftTarget(T=1e4)))
