"""What every section of a recipe is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # with what is added to it, what torch takes
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

NAME = r"^[\w.-]*[\w-][\w.-]*$"  # of a directory beside others: "." and ".." are none
COLDEST = 0.01  # temperature: vLLM samples at this one where it is asked for a lower one


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and values are checked on assignment too.

    Validators are built when a value is first checked: completions and help read the fields alone.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False, defer_build=True)
