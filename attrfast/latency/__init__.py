"""How long a model takes on a device: measured layer by layer once, predicted for every width.

`gauge` is the door: it times the layers of narrowed copies (`sampling`, by `clock`), keeps what it saw
(`table`), finds the law that each layer follows (`law`), and says what a model that lost filters will take,
what each filter costs, and what the real model takes. Must not know what an importance is.
"""

from attrfast.latency.gauge import Gauge, Reading
from attrfast.latency.limit import Limit, parse_limit
from attrfast.latency.passes import inputs_of_a_pass
from attrfast.latency.worth import weighed

__all__ = ["Gauge", "Limit", "Reading", "inputs_of_a_pass", "parse_limit", "weighed"]
