//! Everything that touches a hypervisor: in comes the address of a monitor, out go typed answers about one VM.
//!
//! | module | what it answers |
//! |---|---|
//! | [`qmp`] | the wire: connect, ask, time out, keep events apart from replies |
//! | [`libvirt`] | the same through libvirt, where it holds QEMU's monitor |
//! | [`monitor`] | the same, whatever lies between us and QEMU |
//! | [`process`] | which process is a pod's QEMU, by its cgroup |
//! | [`vm`] | in which state the VM is, and whether it may be measured |
//! | [`ram`] | where in the QEMU process the guest's memory lies |
//! | [`cpus`] | how busy its CPUs are, as the kernel counts it |
//! | [`dirty_rate`] | how much the guest writes within a window, as QEMU itself measures it |
//! | [`migration`] | starting, limiting and reading a migration |
//!
//! QEMU's answers are hostile input: the process next to the guest may have been taken over by it.

pub mod cpus;
pub mod dirty_rate;
mod error;
mod event;
pub mod libvirt;
mod lines;
pub mod migration;
pub mod monitor;
pub mod process;
pub mod qmp;
pub mod ram;
mod socket;
pub mod vm;
