//! The laboratory: real QEMU guests with a known write process, and real migrations between them.
//!
//! | module | what it does |
//! |---|---|
//! | [`guest`] | builds the paced guest and says what it writes |
//! | [`mod@libvirt`] | a libvirt daemon with the guest as its domain, laid out as on a KubeVirt node |
//! | [`cgroup`] | a pod's cgroup, as the kubelet would make it; one with a memory limit |
//! | [`memory`] | huge pages, and what the kernel tells of memory |
//! | [`vm`] | starts and ends a QEMU with it, as a source or as the target of a migration |
//! | [`mod@migrate`] | moves a guest for real and reads the truth |
//! | [`libvirt_migration`] | the same from libvirt to libvirt |
//! | [`under`] | the settings that accuracy is tested under, in short |
//! | [`pulse`] | the longest pause in a guest's writing, as the guest itself saw it |
//! | [`link`] | a line of a given rate between two QEMUs |
//! | [`host`] | measures this host's constants |
//!
//! Whatever is started here ends with the value that stands for it, and with this process, however that ends.

pub mod cgroup;
pub mod guest;
pub mod host;
pub mod libvirt;
pub mod libvirt_migration;
pub mod link;
pub mod memory;
pub mod migrate;
pub mod pulse;
mod qemu;
pub mod under;
pub mod vm;

pub use guest::{GuestSpec, Writes};
pub use libvirt::{DomainSpec, Launcher};
pub use libvirt_migration::migrate_domain;
pub use migrate::{Nudge, Outcome, Settings, Truth, migrate, migrate_under};
pub use pulse::Pulse;
pub use under::Under;
pub use vm::{Vm, VmSpec};
