//! Plans of a scene: of its VMs alone.
//!
//! In: what is wanted. Out: a MigrationPlan, and its status once it is as wanted.

use std::time::Duration;

use anyhow::{Result, anyhow};
use kube::Api;
use migvisor::api::{MigrationPlan, MigrationPlanStatus};
use serde_json::{Value, json};

use super::Scene;

impl Scene<'_> {
    /// The plan called `own(name)`, about this scene's VMs.
    pub fn plan_manifest(&self, name: &str, spec: &Value) -> Value {
        let (api, mut spec) = ("migvisor.io/v1alpha1", spec.clone());
        spec["selectors"] = json!({ "namespaceSelector": { "kubernetes.io/metadata.name": self.namespace } });
        json!({ "apiVersion": api, "kind": "MigrationPlan", "metadata": { "name": self.own(name) }, "spec": spec })
    }

    /// Makes that plan.
    pub async fn plan(&self, name: &str, spec: &Value) -> Result<()> {
        self.at_the_end(&["delete", "migrationplan", &self.own(name), "--ignore-not-found"]);
        self.cluster.kubectl().accepts(&self.plan_manifest(name, spec).to_string()).await.map(drop)
    }

    /// The plan as it is.
    pub async fn planned(&self, name: &str) -> Result<MigrationPlan> {
        Ok(Api::<MigrationPlan>::all(self.cluster.client()?).get(&self.own(name)).await?)
    }

    /// Waits until the status of a plan is as wanted.
    pub async fn plan_that(
        &self,
        name: &str,
        what: &str,
        deadline: Duration,
        holds: impl Fn(&MigrationPlanStatus) -> bool,
    ) -> Result<MigrationPlanStatus> {
        let probe = async || Ok(self.planned(name).await?.status.filter(&holds));
        match self.until(&format!("the plan {name} that {what}"), deadline, probe).await {
            Ok(status) => Ok(status),
            Err(error) => {
                let status = self.planned(name).await?.status;
                Err(anyhow!("{error:#}\nthe plan: {}", serde_json::to_string(&status)?))
            }
        }
    }
}
