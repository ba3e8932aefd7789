//! Our custom resources, the few KubeVirt fields that we read, annotation keys and reasons.
//!
//! In: objects as an API server stores them. Out: the questions and answers of [`crate::model`], and back. No I/O.
//!
//! | module | what |
//! |---|---|
//! | [`forecast`] | MigrationForecast: the question (spec) and the answer (status) |
//! | [`policy`] | PredictionPolicy, and which one applies to a VM |
//! | [`convert`] | between these objects, the model and the annotations |
//! | [`kubevirt`] | KubeVirt's objects, as far as we read them |
//! | [`names`] | annotation keys, labels, reasons, field managers |
//! | [`scalar`] | quantities and durations as Kubernetes writes them |

pub mod convert;
pub mod forecast;
pub mod kubevirt;
pub mod names;
pub mod policy;
pub mod scalar;

pub use forecast::{MigrationForecast, MigrationForecastSpec, MigrationForecastStatus};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
pub use policy::{PredictionPolicy, PredictionPolicySpec};

/// The API group of our objects.
pub const GROUP: &str = "migvisor.io";

/// Every custom resource of ours, as it is installed in a cluster.
pub fn crds() -> Vec<CustomResourceDefinition> {
    vec![MigrationForecast::crd(), PredictionPolicy::crd()]
}
