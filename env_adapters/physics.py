"""What the adapters of brax and MuJoCo share: options, masks, and drawing without a screen."""

import contextlib
import inspect
import os
import sys
from collections.abc import Callable

from env_adapters.library import silence
from harness.errors import UsageError

# Arguments of constructors that only serve to draw; `Task.render` draws in one way.
CAMERA = ("camera_config", "camera_id", "camera_name", "max_geom", "visual_options", "render_fps")


@contextlib.contextmanager
def quiet():
    """`silence`, and no warnings of MuJoCo itself, which appends them to ./MUJOCO_LOG.TXT."""
    import mujoco

    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with silence():
            yield
    finally:
        mujoco.set_mju_user_warning(None)


def arguments_of(constructor) -> dict:
    """The named arguments of a constructor with their defaults, to check options against.

    Defaults of arguments that are annotated as float become floats, so that 1 may be set to 0.5.
    """

    def default_of(argument):
        return float(argument.default) if argument.annotation is float else argument.default

    return {
        argument.name: default_of(argument)
        for argument in inspect.signature(constructor).parameters.values()
        if argument.default is not argument.empty and not argument.name.endswith(CAMERA)
    }


def take_max_steps(owner: str, options: dict, default: int, name: str = "max_steps") -> int:
    """Remove max_steps, or what it is called, from the options; return it, or its default.

    Raises:
      ValueError: it is less than 1.
    """
    max_steps = options.pop(name, default)
    if max_steps < 1:
        raise ValueError(f"option {name} of {owner} must be at least 1, got {max_steps}")
    return max_steps


def without_screen(render: Callable, owner: str) -> Callable:
    """`render` of MuJoCo for machines that may have no screen.

    Raises:
      UsageError: MuJoCo finds no way to draw; says in one sentence what to try.
    """

    def rendered(state):
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        try:
            with quiet():
                return render(state)
        except Exception as error:  # every OpenGL backend has exceptions of its own
            reason = (str(error) or repr(error)).splitlines()[0]
            failure = f"{owner} cannot be drawn here, MuJoCo gets no OpenGL context ({reason})"
            advice = "the environment variable MUJOCO_GL chooses between egl, osmesa and glfw"
            raise UsageError(f"{failure}; {advice}") from None

    return rendered


# How many coordinates of qpos the observation leaves out: the robot's place in the plane.
HIDDEN_COORDINATES = {
    "halfcheetah": 1,
    "hopper": 1,
    "walker2d": 1,
    "swimmer": 2,
    "ant": 2,
    "humanoid": 2,
    "humanoidstandup": 2,
}


def kinematic_masks(
    env_id: str,
    env,
    nq: int,
    nv: int,
    cinert: int,
    cvel: int,
) -> dict[str, tuple[int, ...]]:
    """The masks "position" and "velocity" of a robot; brax and Gymnasium order entries alike.

    Entries that follow from qpos alone are positions: joint angles and their sines and cosines,
    places of bodies, and the bodies' inertia about the centre of mass. Entries that follow from
    qvel as well are velocities. Forces are neither.

    Args:
      nq: entries of qpos; nv: entries of qvel.
      cinert: entries of the bodies' inertia, and cvel: of the bodies' velocities. Only humanoids
        show these.
    """
    robot = env_id.partition("-")[0].lower().replace("_", "")
    # The kind of each entry: p for position, v for velocity. Forces, if any, come last.
    if robot == "inverteddoublependulum":
        kinds = "p" * 5 + "v" * 3  # cart, sines, cosines; velocities
    elif robot == "reacher":
        kinds = "p" * 6 + "v" * 2 + "p" * 3  # cosines, sines, target; velocities; fingertip
    elif robot == "pusher":
        kinds = "p" * 7 + "v" * 7 + "p" * 9  # joints; velocities; fingertip, object and goal
    else:
        hidden = HIDDEN_COORDINATES.get(robot, 0)
        hidden *= getattr(env, "_exclude_current_positions_from_observation", True)
        kinds = "p" * (nq - hidden) + "v" * nv
        if robot.startswith("humanoid"):
            kinds += "p" * cinert + "v" * cvel
    return {
        name: tuple(i for i, kind in enumerate(kinds) if kind == name[0])
        for name in ("position", "velocity")
    }
