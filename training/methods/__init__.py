"""Selection methods, one file each, and the one list of them.

Tests, evaluation, studies and benchmark run every method of this list. To add one, write a file with a `score`
function and its [`Method`] (`divprune.py` is an example), and add a line below.
"""

from training.methods.cdpruner import CDPRUNER
from training.methods.centre import CENTRE
from training.methods.divprune import DIVPRUNE
from training.methods.fastv import FASTV
from training.methods.random_tiles import RANDOM_TILES
from training.methods.random_tokens import RANDOM
from training.methods.visionzip import VISIONZIP
from training.methods.vispruner import VISPRUNER


METHODS = {
    method.name: method for method in (RANDOM, CENTRE, RANDOM_TILES, FASTV, VISIONZIP, DIVPRUNE, CDPRUNER, VISPRUNER)
}
