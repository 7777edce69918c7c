"""One plan in a process of its own: the compiler may end it, and wants its environment before JAX starts.

python -m jdiff.plan.worker CONFIG_AS_JSON prints the plan, or {"error": ...}, as JSON in its last line.
"""

import json
import sys


def main(text: str) -> None:
    from jdiff.plan import PlanConfig, plan

    options = json.loads(text)
    try:
        found = plan(PlanConfig(**{**options, "ema": tuple(options["ema"])})).to_json()
    except ValueError as error:
        found = {"error": str(error)}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
