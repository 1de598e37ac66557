"""The hub on loopback."""

from tests.hub.conftest import loopback as loopback
from tests.hub.conftest import stub as stub
