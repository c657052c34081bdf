"""Let each call of the kernel fail with each errno, and judge what becomes of the work.

- `sites`: the calls, found in the source, and the means to let them fail.
- `touch`: what runs at each call.
- `scenarios`: what is done meanwhile, and what the work says of itself.
- `worker`: one process that runs cases, one after another.
- `cases`: which errno for which call, in which order, and the judgement.

``python -m tests.faults`` runs cases and prints figures.
"""
