"""From chapter source to page: measure apart from telling, keep what is good, build the site.

Run ``python -m book.engine --help`` from the project's folder. The way of a chapter::

    toolkit/labs/<part>/<slug>.py   --measures-->  book/results/<slug>.<scale>.json
    book/chapters/<part>/<slug>.md  --jupytext-->  cells  --papermill, reading results-->
        book/notebooks/<part>/<slug>.ipynb

``project`` knows the folders, ``source`` reads a chapter, ``exercises`` its exercises, ``lab``
starts what measures, ``beds`` knows the test beds, ``key`` says what a page depends on, ``plan``
decides what is stale and what to do, ``schedule`` shares the machine, ``progress`` tells how it
goes, ``watch`` keeps an eye on one running chapter, ``worker`` is that chapter's own process,
``record`` makes the page, ``origin`` says where it comes from, ``install`` puts it into place,
``marks`` names pages with stale numbers. ``trial`` runs a chapter aside, ``compare`` puts two runs
beside each other, ``ran`` notes which functions run, ``clear`` judges a change of code, ``renew``
renews keys and ``verify`` is made of these, ``former`` being the project at a commit. ``leash``
ends a lab whose engine is gone. ``notebooks`` writes today's chapters for nbval, ``course`` the
student and instructor sets, ``site`` the rendered book. ``options`` are those that commands share.
"""
