"""Test beds that labs share: a pretrained network, a shift, and what simple arms reach on it.

``characters``, ``images``, ``speech`` and ``texts`` are modules of one form. ``load(scale)`` gives
the data in parts that do not overlap, ``network(scale)`` a fresh copy of the pretrained base,
``train(arm, rate, seed, ...)`` one run with any toolkit method, and ``adapt(...)`` the same as a
job: plain arguments in, a flat dict of plain numbers out, one thread. ``python -m
toolkit.labs.beds characters`` measures the reference arms, ``python -m toolkit.labs.beds.pretrain
characters`` makes the base. Scale ``ci`` takes the same code path with generated stand-ins and
small networks; ``gpu`` takes the sizes of ``cpu``.
"""
