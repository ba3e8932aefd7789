//! `make e2e`: the scenarios of the whole product in a whole cluster, one after the other, each with its wall time. `make e2e-cluster` runs the
//! same ones in the cluster of `KUBECONFIG`; what it cannot give is told as *not run*.
//!
//! A new scenario is an `async fn(&Scene<'_>) -> Result<()>` in one of the modules, and a line in [`ALL`].

mod admission;
mod drains;
mod faults;
mod force;
mod hold;
mod outside;
mod overrides;
mod plan;
mod scale;

use std::{
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use migvisor_e2e::{
    scenario,
    scenario::{Cluster, Scenario, Scene},
};
use tokio::{runtime::Runtime, sync::OnceCell};

/// All scenarios, in the order in which they run.
const ALL: &[Scenario] = &[
    scenario!(admission::calm_vm_is_admitted_and_moves),
    scenario!(admission::wild_vm_is_denied_with_advice),
    scenario!(admission::warn_warns),
    scenario!(admission::audit_only_records),
    scenario!(admission::two_policies_match),
    scenario!(outside::no_agent_hinders_nobody; NodeWithoutAgent),
    scenario!(outside::block_migration_is_untouched; WritableStatus),
    scenario!(outside::send_to_and_receive_are_untouched; DecentralizedMigration),
    scenario!(hold::a_doubtful_migration_is_held_tried_out_and_moves),
    scenario!(hold::what_was_tried_out_before_is_not_held),
    scenario!(hold::what_is_denied_by_now_is_abandoned),
    scenario!(hold::the_policy_changes_between_admission_and_hand_off),
    scenario!(hold::hotplug_attachment_pods_are_not_gated; WritableStatus),
    scenario!(force::what_its_dry_run_fails_is_forced_by_budget),
    scenario!(force::what_its_dry_run_fails_is_forced_by_bandwidth),
    scenario!(force::what_its_dry_run_fails_is_forced_by_auto_converge),
    scenario!(force::force_outscores_a_persons_policy),
    scenario!(force::what_forced_a_migration_goes_when_the_controller_died; KillController),
    scenario!(drains::a_node_with_a_wild_vm_is_evacuated; DrainNodes),
    scenario!(drains::a_workload_update_is_let_through; WorkloadUpdates, WritableStatus),
    scenario!(drains::a_denied_evacuation_is_refused_and_stays_quiet),
    scenario!(drains::only_kubevirt_is_believed_that_it_drains),
    scenario!(overrides::an_override_lets_through_and_expires),
    scenario!(overrides::an_override_is_refused_to_whom_rbac_refuses_it),
    scenario!(plan::plan_picks_what_exhaustive_search_picks),
    scenario!(plan::plan_executes_is_interrupted_and_resumes; KillController),
    scenario!(plan::plans_execute_is_refused_to_who_may_not_migrate),
    scenario!(faults::the_controller_dies_while_a_gate_is_on; KillController),
    scenario!(faults::the_agent_dies_in_a_dry_run; KillAgent),
    scenario!(faults::a_vmi_deleted_in_every_phase),
    scenario!(faults::the_api_server_is_restarted_in_between; RestartApiServer),
    scenario!(scale::fifty_migrations_at_once; ManyVms),
];

/// The one cluster of this run, opened by the first scenario that needs it.
struct Stage {
    runtime: Runtime,
    cluster: OnceCell<Result<Cluster, String>>,
}

impl Stage {
    fn run(&self, scenario: Scenario) -> Result<Completion, Failed> {
        self.runtime.block_on(async {
            let opened = self.cluster.get_or_init(async || Cluster::open().await.map_err(|error| format!("{error:?}")));
            let cluster = opened.await.as_ref().map_err(|error| anyhow!("there is no cluster: {error}"))?;
            if let Some(why) = scenario.needs.iter().find_map(|need| cluster.lacks(*need)) {
                return Ok(Completion::ignored_with(format!("not run: {why}")));
            }
            let start = Instant::now();
            let ended = play(cluster, scenario).await;
            println!("{:<48} {:6.1} s", scenario.name, start.elapsed().as_secs_f64());
            ended.map(|()| Completion::Completed).map_err(|error| Failed::from(format!("{error:?}")))
        })
    }
}

async fn play(cluster: &Cluster, scenario: Scenario) -> Result<()> {
    /// Longer than any scenario takes anywhere.
    const DEADLINE: Duration = Duration::from_secs(900);
    let scene = Scene::open(cluster, scenario.name).await?;
    let played = tokio::time::timeout(DEADLINE, (scenario.run)(&scene)).await;
    let played = played.unwrap_or_else(|_| Err(anyhow!("it did not end within {DEADLINE:?}")));
    // What it leaves behind is taken away in any case; the first failure is the one to tell.
    let closed = scene.close().await.context("the scene could not be cleared");
    let well = cluster.product_is_well().await;
    played.and(closed).and(well)
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One cluster, two cores.
    arguments.test_threads = Some(1);
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let stage = Arc::new(Stage { runtime, cluster: OnceCell::new() });
    let trial = |scenario: &Scenario| {
        let (stage, scenario) = (Arc::clone(&stage), *scenario);
        Trial::ignorable_test(scenario.name, move || stage.run(scenario))
    };
    let conclusion = libtest_mimic::run(&arguments, ALL.iter().map(trial).collect());
    // The cluster ends before this process does, and while there is a runtime.
    if let Some(Stage { runtime, cluster }) = Arc::into_inner(stage) {
        let entered = runtime.enter();
        drop(cluster);
        drop(entered);
    }
    conclusion.exit_code()
}
