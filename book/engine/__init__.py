"""From chapter source to page: execute what is stale, keep what is good, build the site.

Run ``python -m book.engine --help`` from the project's folder. The way of a chapter::

    book/chapters/<part>/<slug>.md  --jupytext-->  cells  --papermill-->  outputs
        -->  book/notebooks/<part>/<slug>.ipynb  +  book/results/<slug>.<scale>.json

``project`` knows the folders, ``source`` reads a chapter, ``exercises`` its exercises, ``trace``
finds the toolkit modules it uses, ``key`` says when a page is stale, ``plan`` decides what to run,
``schedule`` shares the machine, ``progress`` tells how it goes, ``watch`` keeps an eye on one
running chapter, ``worker`` is that chapter's own process, ``record`` makes the page, ``install``
puts it into place, ``course`` makes the student and instructor sets, ``site`` the rendered book.
"""
