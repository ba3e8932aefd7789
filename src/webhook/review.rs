//! `AdmissionReview`s, read and written. Pure.
//!
//! In: the bytes of a body. Out: the object in it, as far as it can be read; the review that answers.

use std::collections::BTreeMap;

use json_patch::{AddOperation, Patch, PatchOperation, RemoveOperation, jsonptr::PointerBuf};
use k8s_openapi::{ByteString, api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Resource,
    core::{
        admission::{self, AdmissionRequest, AdmissionResponse, AdmissionReview, Operation},
        response::StatusSummary,
    },
};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::api::{kubevirt::VirtualMachineInstanceMigration, names};

/// Why a body is no request that can be answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReviewError {
    /// Not that kind of JSON.
    #[error(
        "the body is no AdmissionReview of admission.k8s.io/v1: {0}; this address is for the API server, see the \
         MutatingWebhookConfiguration and the ValidatingWebhookConfiguration of migvisor"
    )]
    NoReview(String),
}

/// A kind of object under admission.
pub(super) trait Admissible: Resource<DynamicType = ()> + Clone + Default + DeserializeOwned {
    /// What it lacks that we cannot do without.
    fn problem(&self) -> Option<&'static str>;
}

impl Admissible for VirtualMachineInstanceMigration {
    fn problem(&self) -> Option<&'static str> {
        self.spec.vmi_name.is_empty().then_some("it has no spec.vmiName")
    }
}

impl Admissible for Pod {
    fn problem(&self) -> Option<&'static str> {
        None
    }
}

/// An object under admission: whatever it is, it can be received.
#[derive(Debug, Clone)]
struct Submitted<K> {
    object: K,
    problem: Option<String>,
}

impl<'de, K: Admissible> Deserialize<'de> for Submitted<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Ok(match serde_json::from_value::<K>(value) {
            Ok(object) => Self { problem: object.problem().map(str::to_owned), object },
            Err(error) => Self { object: K::default(), problem: Some(error.to_string()) },
        })
    }
}

impl<K: Admissible> Resource for Submitted<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> std::borrow::Cow<'_, str> {
        K::kind(&())
    }
    fn group((): &()) -> std::borrow::Cow<'_, str> {
        K::group(&())
    }
    fn version((): &()) -> std::borrow::Cow<'_, str> {
        K::version(&())
    }
    fn plural((): &()) -> std::borrow::Cow<'_, str> {
        K::plural(&())
    }
    fn meta(&self) -> &ObjectMeta {
        self.object.meta()
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.object.meta_mut()
    }
}

/// A question of the API server.
#[derive(Debug)]
pub(super) struct Request<K: Admissible>(AdmissionRequest<Submitted<K>>);

impl<K: Admissible> Request<K> {
    /// Reads a body.
    pub(super) fn read(body: &[u8]) -> Result<Self, ReviewError> {
        let no = |why: String| ReviewError::NoReview(why);
        let review: AdmissionReview<Submitted<K>> = serde_json::from_slice(body).map_err(|error| no(error.to_string()))?;
        let types = &review.types;
        if (types.kind.as_str(), types.api_version.as_str()) != (admission::META_KIND, admission::META_API_VERSION_V1) {
            return Err(no(format!("it is a {} of {}", types.kind, types.api_version)));
        }
        let request: AdmissionRequest<Submitted<K>> = review.try_into().map_err(|_| no("it has no request".to_owned()))?;
        Ok(Self(request))
    }

    pub(super) fn is_create(&self) -> bool {
        self.0.operation == Operation::Create
    }

    pub(super) fn is_dry_run(&self) -> bool {
        self.0.dry_run
    }

    pub(super) fn namespace(&self) -> &str {
        self.0.namespace.as_deref().unwrap_or_default()
    }

    pub(super) fn user(&self) -> &str {
        self.0.user_info.username.as_deref().unwrap_or_default()
    }

    /// The object, where it can be read.
    pub(super) fn object(&self) -> Option<&K> {
        self.0.object.as_ref().filter(|object| object.problem.is_none()).map(|object| &object.object)
    }

    /// Why it cannot be read.
    pub(super) fn problem(&self) -> Option<&str> {
        match &self.0.object {
            Some(object) => object.problem.as_deref(),
            None => Some("the request has no object"),
        }
    }

    /// The whole answer.
    pub(super) fn review(&self, answer: Answer) -> Result<Value, serde_json::Error> {
        let mut response = AdmissionResponse::from(&self.0);
        if let Some(message) = answer.denial {
            response = response.deny(message);
            response.result.status = Some(StatusSummary::Failure);
            response.result.code = 403;
            "Forbidden".clone_into(&mut response.result.reason);
        }
        response.warnings = Some(answer.warnings).filter(|warnings| !warnings.is_empty());
        let mut review = serde_json::to_value(response.into_review())?;
        if let (false, Some(fields)) = (answer.patch.0.is_empty(), review.get_mut("response").and_then(Value::as_object_mut)) {
            // Kubernetes documents base64; kube's own type writes an array of numbers.
            fields.insert("patchType".to_owned(), json!("JSONPatch"));
            fields.insert("patch".to_owned(), serde_json::to_value(ByteString(serde_json::to_vec(&answer.patch)?))?);
        }
        Ok(review)
    }
}

/// What is answered.
#[derive(Debug, Default)]
pub(super) struct Answer {
    denial: Option<String>,
    warnings: Vec<String>,
    patch: Patch,
}

impl Answer {
    pub(super) fn allow() -> Self {
        Self::default()
    }

    pub(super) fn deny(message: String) -> Self {
        Self { denial: Some(message), ..Self::default() }
    }

    pub(super) fn with_warning(mut self, warning: String) -> Self {
        self.warnings.push(warning);
        self
    }

    pub(super) fn with_patch(mut self, patch: Patch) -> Self {
        self.patch = patch;
        self
    }
}

/// The patch that takes our annotations off and puts these on. Nothing else is touched.
pub(super) fn annotate(migration: &VirtualMachineInstanceMigration, ours: BTreeMap<String, String>) -> Patch {
    let at = |key: &str| PointerBuf::from_tokens(["metadata", "annotations", key]);
    let mut patch = Vec::new();
    match &migration.metadata.annotations {
        None if ours.is_empty() => {}
        None => patch.push(PatchOperation::Add(AddOperation {
            path: PointerBuf::from_tokens(["metadata", "annotations"]),
            value: json!(ours),
        })),
        Some(present) => {
            let stale = present.keys().filter(|key| key.starts_with(names::PREFIX) && !ours.contains_key(*key));
            patch.extend(stale.map(|key| PatchOperation::Remove(RemoveOperation { path: at(key) })));
            patch.extend(
                ours.into_iter().map(|(key, value)| PatchOperation::Add(AddOperation { path: at(&key), value: json!(value) })),
            );
        }
    }
    Patch(patch)
}

/// The patch that takes our gate off a pod that is being made.
pub(super) fn ungate(pod: &Pod) -> Patch {
    let gates = pod.spec.as_ref().and_then(|spec| spec.scheduling_gates.as_deref()).unwrap_or_default();
    // From the end: what is removed moves the rest up.
    let ours = gates.iter().enumerate().rev().filter(|(_, gate)| gate.name == names::GATE);
    let at = |index: usize| PointerBuf::from_tokens(["spec", "schedulingGates", &index.to_string()]);
    Patch(ours.map(|(index, _)| PatchOperation::Remove(RemoveOperation { path: at(index) })).collect())
}

/// The patch that puts our gate on a pod.
pub(super) fn gate(pod: &Pod) -> Patch {
    let gate = json!({ "name": names::GATE });
    let gates = |tail: Option<&str>| PointerBuf::from_tokens(["spec", "schedulingGates"].into_iter().chain(tail));
    let present = pod.spec.as_ref().is_some_and(|spec| spec.scheduling_gates.is_some());
    let (path, value) = if present { (gates(Some("-")), gate) } else { (gates(None), json!([gate])) };
    Patch(vec![PatchOperation::Add(AddOperation { path, value })])
}
