//! Our custom resources, the few KubeVirt fields that we read, annotation keys and reasons.
//!
//! In: objects as an API server stores them. Out: the questions and answers of [`crate::model`], and back. No I/O.
//!
//! | module | what |
//! |---|---|
//! | [`forecast`] | MigrationForecast: the question (spec) and the answer (status) |
//! | [`fingerprint`] | which question an answer answers |
//! | [`dry_run`] | a forecast's dry run: asked for, in progress, answered; and its way to and from the model |
//! | [`migration`] | real migrations: the hint that one is under way, what the agent reads of it, the truth at its end |
//! | [`migration_override`] | MigrationOverride: lets the migrations of a VM through for a while |
//! | [`plan`] | MigrationPlan: what is wanted of many VMs, and the plan |
//! | [`policy`] | PredictionPolicy, and which one applies to a VM |
//! | [`remedy`] | what may be done about a migration that would not converge: allowed, asked, answered |
//! | [`convert`] | between these objects, the model and the annotations |
//! | [`kubevirt`] | KubeVirt's objects, as far as we read them |
//! | [`node`] | nodes, as far as we read them |
//! | [`names`] | annotation keys, labels, reasons, field managers |
//! | [`scalar`] | quantities and durations as Kubernetes writes them |
//! | `schema` | schemas of scalars |

pub mod convert;
pub mod dry_run;
pub mod fingerprint;
pub mod forecast;
pub mod kubevirt;
pub mod migration;
pub mod migration_override;
pub mod names;
pub mod node;
pub mod plan;
pub mod policy;
pub mod remedy;
pub mod scalar;
mod schema;

pub use fingerprint::QuestionRef;
pub use forecast::{MigrationForecast, MigrationForecastSpec, MigrationForecastStatus};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
pub use migration_override::{MigrationOverride, MigrationOverrideSpec};
pub use plan::{MigrationPlan, MigrationPlanSpec, MigrationPlanStatus};
pub use policy::{PredictionPolicy, PredictionPolicySpec};

/// The API group of our objects.
pub const GROUP: &str = "migvisor.io";

/// Every custom resource of ours, as it is installed in a cluster.
pub fn crds() -> Vec<CustomResourceDefinition> {
    vec![MigrationForecast::crd(), MigrationOverride::crd(), MigrationPlan::crd(), PredictionPolicy::crd()]
}
