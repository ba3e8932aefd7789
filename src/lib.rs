//! MigVisor for KubeVirt: predicts whether a live migration will converge, before it starts.
//!
//! | room | what lives there |
//! |---|---|
//! | [`model`] | pure: patterns, QEMU's pre-copy loop, KubeVirt's rules, forecasts. Imports none of the others |
//! | [`decision`] | pure: from a forecast and a policy to allow, warn or deny; shared by admission and reconciliation |
//! | [`qemu`] | QMP, the process of a VM, its RAM |
//! | [`collector`] | watches a running guest's memory and describes who writes which page when |
//! | [`dryrun`] | has QEMU execute a migration to nowhere, and counts |
//! | [`api`] | our custom resources, the few KubeVirt fields that we read, annotation keys and reasons |
//! | [`agent`] | the node daemon |
//! | [`manager`] | the controller: observe, decide, apply |
//! | [`webhook`] | admission, answered from memory |
//! | [`runtime`] | telemetry, metrics, health, TLS, leases, shutdown |
//! | [`cli`] | one file a subcommand |

pub mod agent;
pub mod api;
pub mod cli;
pub mod collector;
pub mod decision;
pub mod dryrun;
pub mod manager;
pub mod model;
pub mod qemu;
pub mod runtime;
pub mod webhook;
