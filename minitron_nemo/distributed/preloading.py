"""Imported first by the fork server, which then imports what ranks need: nothing of that is garbage.

Its children collect again, from where they begin (`launch._rank_main`).
"""

import gc

gc.disable()
