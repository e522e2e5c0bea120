"""The fields of cards of differential equations: equations, costs and sensors."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from invdiff.card_fields import Count, Flag, Index, NotNegative, Positive, Table


class BurgersTable(Table):
    """Cases of viscous Burgers' equation: a published setting, parts of it replaced where they are given.

    Cases are held out by their seed; training takes seed 0. `refine` is the number of cells in a control cell of the
    solver that makes the data and judges.
    """

    type: Literal["Burgers"]
    setting: str
    partial: Literal["none", "control", "observation", "both"] = "none"
    points: Annotated[int, Field(strict=True, ge=5)] | None = None
    windows: Count | None = None
    duration: Positive | None = None
    viscosity: Positive | None = None
    narrow: Positive | None = None
    scale: Positive | None = None
    seed: Index = 1
    cases: Count = 50
    refine: Count = 4


class AdvectionTable(Table):
    """Cases of linear advection: a setting, parts of it replaced where they are given.

    The interval is (0, 1), periodic; nothing has a unit. Cases are held out by their seed; training takes seed 0. The
    trajectories that make the data are exact.
    """

    type: Literal["Advection"]
    setting: str
    points: Annotated[int, Field(strict=True, ge=3)] | None = None
    states: Annotated[int, Field(strict=True, ge=2)] | None = None
    duration: Positive | None = None
    speed: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    waves: Count | None = None
    highest: Count | None = None
    seed: Index = 1
    cases: Count = 50


class FlowTable(Table):
    """Cases of one-dimensional compressible flow: a setting, parts of it replaced where they are given.

    The interval is (-1, 1), open at its ends; nothing has a unit. Cases are held out by their seed; training takes
    seed 0. `refine` is the number of cells in a cell of the solver that makes the data, and `steps` that of its steps
    between two states, as many as stability asks for if it is not given.
    """

    type: Literal["Flow"]
    setting: str
    points: Annotated[int, Field(strict=True, ge=2)] | None = None
    states: Annotated[int, Field(strict=True, ge=2)] | None = None
    duration: Positive | None = None
    gamma: Annotated[float, Field(strict=True, gt=1.0, allow_inf_nan=False)] | None = None
    viscosity: NotNegative | None = None
    steps: Count | None = None
    seed: Index = 1
    cases: Count = 50
    refine: Count = 4


EquationTable = Annotated[BurgersTable | AdvectionTable | FlowTable, Field(discriminator="type")]


class ControlTable(Table):
    """A cost to be low: mean squared distance from the target, and weight times the sum of the squared forcing.

    The final state is the trajectory's own or, with `solver`, what a solver with `refine` cells in a control cell makes
    of the forcing. The likelihood is exp(-J / temperature). Without a solver that is a Gaussian one of the target and
    of no forcing; with `quadratic` it is handed over as such, so that samplers run which need linear measurements.
    """

    weight: NotNegative
    temperature: Positive
    solver: Flag = False
    refine: Count = 2
    quadratic: Flag = False

    @model_validator(mode="after")
    def _is_quadratic(self) -> Self:
        """Check that a cost through the solver is not taken for a quadratic one."""
        if self.quadratic and self.solver:
            raise ValueError("the cost is quadratic without a solver alone; give quadratic or solver")
        return self


class SensorsTable(Table):
    """Sensors of the state in `count` cells, by index, or in all; they read the states `first` to `last`.

    Number 0 is the initial state; every so-manieth is read. Sensors read every variable of the state, with noise of
    one standard deviation, in the state's units.
    """

    count: Count | None = None
    first: Index = 0
    last: Index | None = None
    every: Count = 1
    noise_std: Positive


class EquationCard(Table):
    """A problem of trajectories that obey a differential equation."""

    name: str
    version: Index
    title: str
    description: str
    equation: EquationTable
    given: tuple[Literal["initial", "target", "state", "forcing"], ...]
    control: ControlTable | None = None
    sensors: SensorsTable | None = None

    @model_validator(mode="after")
    def _is_forced(self) -> Self:
        """Check that nothing is controlled, aimed at or given of a forcing where the equation has none."""
        if isinstance(self.equation, BurgersTable):
            return self
        name = self.equation.type
        if self.control is not None:
            raise ValueError(f"the equation {name!r} has no forcing to control; give a table sensors, not control")
        if wrong := sorted({"forcing", "target"} & set(self.given)):
            raise ValueError(
                f"the equation {name!r} has no forcing, and no target to force it to; given may hold 'initial' and "
                f"'state', not {' and '.join(map(repr, wrong))}"
            )
        return self

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        """Check that there is either something to reach or something measured."""
        if (self.control is None) == (self.sensors is None):
            raise ValueError("a problem of an equation has either a table control or a table sensors")
        return self
