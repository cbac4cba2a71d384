"""Render README.md from nbs/index.ipynb without Quarto: python .ci/readme.py

Images that the page shows go to index_files/, as nbdev_readme would have it.
"""
import re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent

def render():
    "Text of the README and its images by file name"
    nb = nbformat.read(root/'nbs/index.ipynb', 4)
    def directives(cell): return [l for l in cell.source.splitlines() if l.startswith('#|')]
    nb.cells = [c for c in nb.cells if not any('hide' in d for d in directives(c))]
    for c in nb.cells:
        c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
        for o in c.get('outputs', []):
            if 'data' in o and 'text/html' in o.data: o.data = {'text/html': o.data['text/html']}     # tables of fits
        c.outputs = [o for o in c.get('outputs', []) if '<style>' not in o.get('data', {}).get('text/html', '')]
    text,res = MarkdownExporter().from_notebook_node(nb, resources=dict(unique_key='index', output_files_dir='index_files'))
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n',res['outputs']

if __name__ == '__main__':
    text,images = render()
    (root/'README.md').write_text(text)
    (root/'index_files').mkdir(exist_ok=True)
    for name,image in images.items(): (root/name).write_bytes(image)
