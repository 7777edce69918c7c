"""Planning a run on hardware that is not there: the very step, compiled ahead of time for a topology.

plan = jdiff.plan.plan(PlanConfig(net="DiT-XL/2", topology="v5e:16x16", mesh="data=16,fsdp=16", batch=2048))
print(jdiff.plan.report(plan))
"""

from .chips import CHIPS as CHIPS
from .estimate import Plan as Plan
from .estimate import plan as plan
from .program import PlanConfig as PlanConfig
from .report import report as report
from .report import table as table
