"""Render README.md from nbs/index.ipynb without Quarto: python .ci/readme.py

Images that the page shows go to index_files/, as with nbdev_readme.
"""
import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent

def apply_directives(cell):
    "Do what nbdev and Quarto do with the `#|` lines of a cell; its caption, if it has one"
    lines = re.findall(r'^#\|\s*(.*)$\n?', cell.source, flags=re.M)
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    if 'echo: false' in lines: cell.metadata['transient'] = dict(remove_source=True)
    if 'output: false' in lines: cell.outputs = []
    return next((l.removeprefix('fig-cap: ').strip('"') for l in lines if l.startswith('fig-cap: ')), None)

def render():
    "Text of the README, and its images by file name"
    nb = nbformat.read(root/'nbs/index.ipynb', 4)
    nb.metadata['language_info'] = dict(name='python')
    nb.cells = [c for c in nb.cells if not c.source.startswith('#| hide')]
    captions = []
    for c in (c for c in nb.cells if c.cell_type == 'code'):
        captions.append(apply_directives(c))
        c.outputs = [o for o in c.outputs if '<style>' not in o.get('data', {}).get('text/html', '')]     # of fastai's progress bars
    text,res = MarkdownExporter().from_notebook_node(nb, resources=dict(unique_key='index', output_files_dir='index_files'))
    for caption in filter(None, captions):     # GitHub shows no alternative texts
        text = re.sub(r'!\[png\](\(.*\))', lambda m: f'![{caption}]{m[1]}\n\n*{caption}*', text, count=1)
    text = re.sub(r'[ \r]+\n', '\n', text)     # commands print to a terminal, with carriage returns
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n',res['outputs']

if __name__ == '__main__':
    text,images = render()
    (root/'README.md').write_text(text)
    (root/'index_files').mkdir(exist_ok=True)
    for name,image in images.items(): (root/name).write_bytes(image)
