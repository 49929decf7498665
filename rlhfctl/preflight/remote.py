"""What the handshake of a remote reward says of the template it scores through."""

from typing import TYPE_CHECKING

from rlhfctl.errors import RlhfctlError
from rlhfctl.recipe.sections import RemoteSource, Reward
from rlhfctl.rewards.build import build_sources

if TYPE_CHECKING:
    from rlhfctl.templates.sides import Side


def remote_sides(reward: Reward | None, missed: list[str] | None = None) -> "list[Side]":
    """A side for each remote reward model that answers; of one that does not the cause is added to `missed` (in the
    preflight it is a finding of the reward check)."""
    from rlhfctl.templates.sides import Side

    sides = []
    for section in reward.sources if reward is not None else []:
        if not isinstance(section, RemoteSource) or section.protocol == "openrlhf":
            continue  # that protocol does not tell the template
        try:
            source = build_sources(Reward(sources=[section]))[0]
        except RlhfctlError as error:
            if missed is not None:
                missed.append(error.message)
            continue
        from rlhfctl.rewards.remote import RemoteReward

        assert isinstance(source, RemoteReward)
        info = source.info
        source.close()
        if info.template is None:
            continue
        where = section.url or (section.urls or [""])[0]
        sides.append(
            Side(
                name=f"{info.name} at {where}",
                template=info.template.text,
                source=where,
                sources={where: info.template.text},
                tokens=dict(info.template.tokens),
                known=frozenset({"bos", "eos", "pad"}),
            )
        )
    return sides
