"""A hook of MkDocs: notebooks of the gallery become pages, as they were executed, and links to them lead there."""

from pathlib import PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page and the pictures of each notebook; the notebook itself stays beside them, for download."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = PurePosixPath(notebook.src_uri).with_suffix("")
        pictures = {"output_files_dir": name.name}
        text, resources = MarkdownExporter().from_filename(str(notebook.abs_src_path), resources=pictures)
        made = {f"{name}.md": text, **{str(name.parent / key): one for key, one in resources["outputs"].items()}}
        for uri, content in made.items():
            files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to notebooks into links to their pages, which MkDocs checks."""
    return markdown.replace(".ipynb)", ".md)")
