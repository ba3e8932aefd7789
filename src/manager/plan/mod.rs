//! Plans: which VMs to move, in which order and how many at a time; and the moving, where that is wanted.
//!
//! In: the plans, and everything else that the manager knows. Out: their status, and the migrations of those that are to be carried out.
//!
//! | module | what |
//! |---|---|
//! | [`vm`] | pure: a VM as a plan sees it |
//! | [`room`] | pure: is there a node that a VM would fit on |
//! | [`status`] | pure: from a plan and its VMs to its status |
//! | [`execute`] | pure: the next step of a plan that is carried out |
//! | [`news`] | pure: which changes are worth a write |
//! | [`survey`] | gathers what they have to know |
//! | `planner` | watches, waits, writes, creates |

pub mod execute;
pub mod news;
pub(super) mod planner;
pub mod room;
pub mod status;
pub mod survey;
pub mod vm;
