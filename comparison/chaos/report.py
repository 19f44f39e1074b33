"""The one file in which campaigns add up: what each of them has seen, and the table of all."""

import json
from collections.abc import Sequence
from pathlib import Path

from unlocked.comparison.chaos.records import Campaign, format_table
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import from_plain, to_plain

__all__ = ["join", "read_report", "update_report"]


def read_report(path: Path) -> list[Campaign]:
    """The campaigns in a file; none where there is no file.

    Raises:
        ValueError: it is no file of campaigns.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["campaigns"]
        return [from_plain(Campaign, one, str(path)) for one in found]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is no report of faults that could be added to ({type(error).__name__}: {error}); give another file"
        ) from error


def update_report(path: Path, campaign: Campaign) -> list[Campaign]:
    """Puts the campaign as it is now into the file, with the table and what is not well; all that are there now, since
    another process may have added some."""
    campaigns = read_report(path)
    for place, one in enumerate(campaigns):
        if _identity(one) == _identity(campaign):
            campaigns[place] = campaign
            break
    else:
        campaigns.append(campaign)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "table": format_table(campaigns).splitlines(),
        "problems": [problem for campaign in campaigns for problem in campaign.problems],
        "ettr": [campaign.ettr for campaign in campaigns],
        "campaigns": [to_plain(campaign) for campaign in campaigns],
    }
    write_json(path, told)
    return campaigns


def join(campaigns: Sequence[Campaign], campaign: Campaign) -> Campaign:
    """The campaign of the same command, options and commit that has begun; else the given one."""
    for one in campaigns:
        if _identity(one) == _identity(campaign):
            one.is_interrupted = False
            return one
    return campaign


def _identity(one: Campaign) -> tuple[object, ...]:
    return one.command, one.options, one.stages, one.environment.commit
