"""What the robots of brax and of MuJoCo have in common."""

import contextlib
import inspect
import os
import sys
from collections.abc import Callable

from env_adapters.library import silence
from harness.errors import UsageError


@contextlib.contextmanager
def quiet():
    """`silence`, also of MuJoCo itself, which would append its warnings to ./MUJOCO_LOG.TXT, too."""
    import mujoco

    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with silence():
            yield
    finally:
        mujoco.set_mju_user_warning(None)


def arguments_of(constructor) -> dict:
    """What a constructor can be given by name, and the defaults, a whole number for a float written as a float."""
    arguments = inspect.signature(constructor).parameters.values()
    given = {x.name: x for x in arguments if x.default is not x.empty and x.name != "default_camera_config"}
    return {name: float(x.default) if x.annotation is float else x.default for name, x in given.items()}


def take_max_steps(owner: str, options: dict, default: int) -> int:
    max_steps = options.pop("max_steps", default)
    if max_steps < 1:
        raise ValueError(f"option max_steps of {owner} must be at least 1, got {max_steps}")
    return max_steps


def without_screen(render: Callable, owner: str) -> Callable:
    """`render` of MuJoCo on a machine that need not have a screen; what it lacks it says in one sentence."""

    def rendered(state):
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        try:
            with quiet():
                return render(state)
        except Exception as error:  # every way to get an OpenGL context has exceptions of its own
            raise UsageError(
                f"{owner} cannot be drawn here, MuJoCo gets no OpenGL context ({str(error).splitlines()[0]}); "
                "the environment variable MUJOCO_GL chooses between egl, osmesa and glfw"
            ) from None

    return rendered


# coordinates that the observation leaves out: the robot's place in the plane
HIDDEN_COORDINATES = {"halfcheetah": 1, "hopper": 1, "walker2d": 1, "swimmer": 2, "ant": 2, "humanoid": 2}


def kinematic_masks(env_id: str, env, nq: int, nv: int, cinert: int, cvel: int) -> dict[str, tuple[int, ...]]:
    """Positions are what follows from qpos alone, velocities what follows from qvel, too; forces are neither.

    Positions include sines, cosines, places of bodies, and the bodies' inertia about the centre of mass (cinert entries
    of a humanoid); velocities those of the bodies (cvel entries). brax and Gymnasium have the same order.
    """
    robot = env_id.partition("-")[0].lower().replace("_", "")
    if robot == "inverteddoublependulum":
        kinds = "p" * 5 + "v" * 3  # cart, sines, cosines; velocities; then Gymnasium's constraint forces
    elif robot == "reacher":
        kinds = "p" * 6 + "v" * 2 + "p" * 3  # cosines, sines, target; velocities; from target to fingertip
    elif robot == "pusher":
        kinds = "p" * 7 + "v" * 7 + "p" * 9  # joints; velocities; places of fingertip, object and goal
    else:
        hidden = HIDDEN_COORDINATES.get(robot, 0) * getattr(env, "_exclude_current_positions_from_observation", True)
        kinds = "p" * (nq - hidden) + "v" * nv  # then forces
        if robot.startswith("humanoid"):
            kinds += "p" * cinert + "v" * cvel  # then forces
    position, velocity = (tuple(i for i, kind in enumerate(kinds) if kind == letter) for letter in "pv")
    return {"position": position, "velocity": velocity}
