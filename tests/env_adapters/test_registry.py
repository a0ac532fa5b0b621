"""`make`: equal arguments give the same object, wrong ones a sentence that helps."""

import pytest

from envs import make

CARTPOLE, CHAIN = "gymnax::CartPole-v1", "gymnax::MemoryChain-bsuite"


def test_equal_arguments_give_the_same_object():
    assert make(CARTPOLE) is make(CARTPOLE)
    assert make(CARTPOLE) is not make(CARTPOLE, mask=("velocity",))


def test_an_option_of_another_type_is_another_option():
    make(CARTPOLE, delay=1)
    with pytest.raises(ValueError, match="option delay of .* must be int, got True"):
        make(CARTPOLE, delay=True)


def meant(name):
    """The regular expression of the hint at `name`."""
    return rf" \(did you mean '{name}'\?\)"


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("CartPole-v1", {}, "'CartPole-v1' has no namespace" + meant(CARTPOLE)),
        ("gymnax:CartPole-v1", {}, "has no namespace" + meant(CARTPOLE)),
        (
            "gym::CartPole-v1",
            {},
            "'gym' in 'gym::CartPole-v1'" + meant(CARTPOLE) + "; .* has: gymnax",
        ),
        (
            "atari::Qbert",
            {},
            "'atari::Qbert'" + meant("gxm::Gymnasium/ALE/Qbert-v5") + "; this version has: gymnax",
        ),
        (
            "popjaxrl::Catch",
            {},
            "'popjaxrl::Catch'" + meant("gymnax::Catch-bsuite") + "; valid ids of popjaxrl",
        ),
        ("popgym_arcade::SpaceInvaders", {}, meant("gymnax::SpaceInvaders-MinAtar")),
        ("RepeatFirstEasy", {}, meant("popjaxrl::RepeatFirstEasy")),
        (
            "popjaxrl::RepeatFirstEasy",
            {"k": 3},
            "popjaxrl::RepeatFirstEasy has no option 'k'; valid options: sticky_actions",
        ),
        (
            "gymnax::Cartpole-v1",
            {},
            "'gymnax::Cartpole-v1'" + meant(CARTPOLE) + "; valid ids of gymnax: .*Pong",
        ),
        ("gymnax::MNISTBandit-bsuite", {}, "unknown environment 'gymnax::MNISTBandit-bsuite'"),
        (CHAIN, {"memory_lenth": 3}, "no option 'memory_lenth'" + meant("memory_length")),
        (
            CARTPOLE,
            {"mask": ("velocty",)},
            "mask 'velocty'" + meant("velocity") + "; valid .* 0 to 3, or",
        ),
        (CARTPOLE, {"mask": ("4",)}, f"unknown mask '4'; valid for {CARTPOLE}: indices 0 to 3"),
        (CARTPOLE, {"mask": ("-1",)}, "unknown mask '-1'"),
        (CARTPOLE, {"mask": ("position", "velocity")}, "hides the whole observation"),
        ("gymnax::Pong-misc", {"mask": ("0",)}, r"observations of shape \(30, 40, 3\)"),
    ],
)
def test_make_refuses(id, options, message):
    with pytest.raises(ValueError, match=message):
        make(id, **options)
