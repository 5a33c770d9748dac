"""Decides who does what: membership, prefix directory, dispatch and admission. Tokens never pass through here.

`policy/` is pure: functions from a read-only view and `now_s` to decisions that carry their reason.
"""

from coordinator.membership import Membership, MembershipLimits
from coordinator.shell import CoordinatorShell

__all__ = ["CoordinatorShell", "Membership", "MembershipLimits"]
