//! What would neither surely converge nor surely fail: found by asking the product.
//!
//! In: a VM of [`super::Load::Steady`]. Out: a bandwidth and a budget for its migrations under which the pattern leaves a doubt.

use std::ops::Range;

use anyhow::{Context, Result, bail};
use migvisor::{api::MigrationForecast, model::kubevirt::time_budget};
use serde_json::json;

use super::{Scene, scene::SOON};

/// The share of replays that converge, in an answer to the present question.
fn share(forecast: &MigrationForecast) -> Option<f64> {
    forecast.answer().and_then(|answer| answer.probability)
}

impl Scene<'_> {
    /// Gives migrations of this VM such a bandwidth and such a budget that this share of replays converges. The VM needs
    /// [`super::Load::Steady`], and the scene a [`Scene::policy`]. Returns the share.
    pub async fn doubtful(&self, vm: &str, wanted: &Range<f64>) -> Result<f64> {
        let first = self.forecast_that(vm, "is answered", self.cluster.patience(), |it| share(it).is_some()).await?;
        let needs = first.status.and_then(|status| status.least_convergent_bandwidth).context("no bandwidth is enough for it")?;
        // KubeVirt knows whole MiB only, and one of them may decide: other budgets shift the limit a little.
        let needs = needs.rate()?.0 >> 20;
        let (mut low, mut high) = (needs * 3 / 4, needs + 3);
        for budget in [5, 6, 7, 8, 4] {
            while high - low > 1 {
                let middle = low.midpoint(high);
                let found = self.share_at(vm, middle, budget).await?;
                println!("{vm} at {middle} MiB/s, {budget} s per GB: {found} of the replays converge");
                if wanted.contains(&found) {
                    return Ok(found);
                }
                if found < wanted.start { low = middle } else { high = middle }
            }
            (low, high) = (low.saturating_sub(4), high + 3);
        }
        bail!("under no bandwidth near {needs} MiB/s {wanted:?} of the replays of {vm} converge")
    }

    async fn share_at(&self, vm: &str, mebibytes: u64, budget: u64) -> Result<f64> {
        let fields = json!({ "bandwidthPerMigration": format!("{mebibytes}Mi"), "completionTimeoutPerGiB": budget });
        self.change_migrations(&fields).await?;
        let asked = |it: &MigrationForecast| {
            let wanted = it.spec.guest_memory().ok().and_then(|guest| time_budget(budget, guest));
            let rate = it.spec.bandwidth.rate().is_ok_and(|rate| rate.0 == mebibytes << 20);
            rate && it.spec.time_budget.map(|budget| budget.0) == wanted
        };
        let found = self.forecast_that(vm, "is asked anew", SOON, |it| asked(it) && share(it).is_some()).await?;
        share(&found).context("it has one")
    }
}
