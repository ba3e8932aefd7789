//! Looks after the plans: makes them, keeps them fresh, carries them out. Only the leader does.
//!
//! In: the plans, and everything else that the manager knows. Out: their status, and the VirtualMachineInstanceMigrations of those that are
//! to be carried out. What should be written is decided by [`super::status`] and [`super::execute`]; this only reads, writes and waits.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams},
    runtime::reflector::{Store, store::Writer as Feed},
};
use serde_json::json;
use tokio::{
    sync::mpsc,
    task::spawn_blocking,
    time::{Instant, interval, timeout},
};
use tracing::{debug, info, warn};

use super::{
    execute::{self, Advance, migration_name},
    news, status, survey,
};
use crate::{
    api::{
        MigrationPlan, MigrationPlanStatus,
        kubevirt::VirtualMachineInstanceMigration,
        names,
        node::Node,
        plan::{Phase, PlannedMigration, Step},
    },
    manager::{
        Manager,
        apply::PATIENCE,
        watch::{self, Change},
    },
};

/// A plan that nothing is done about is made anew this often.
const REPLAN: Duration = Duration::from_secs(30);
/// One that is carried out is looked at this often: KubeVirt's progress is not told to anybody.
const STEP: Duration = Duration::from_secs(1);
/// After an error.
const PAUSE: Duration = Duration::from_secs(5);

/// Looks after all plans, for ever.
pub(in crate::manager) async fn run(client: &Client, manager: &Manager) {
    let (of_plans, of_nodes) = (Feed::default(), Feed::default());
    let (plans, nodes) = (of_plans.as_reader(), of_nodes.as_reader());
    let (sender, changes) = mpsc::unbounded_channel();
    let planner = Planner { client, manager, plans, nodes };
    tokio::join!(watch::for_plans(client, of_plans, of_nodes, &manager.metrics, &sender), planner.work(changes));
}

struct Planner<'a> {
    client: &'a Client,
    manager: &'a Manager,
    plans: Store<MigrationPlan>,
    nodes: Store<Node>,
}

impl Planner<'_> {
    async fn work(&self, mut changes: mpsc::UnboundedReceiver<Change>) {
        self.manager.knowledge.ready().await;
        if self.plans.wait_until_ready().await.is_err() || self.nodes.wait_until_ready().await.is_err() {
            return std::future::pending().await;
        }
        let mut due: HashMap<String, Instant> = HashMap::new();
        let mut tick = interval(STEP);
        loop {
            tokio::select! {
                change = changes.recv() => match change {
                    None => return std::future::pending().await,
                    Some(Change::One(key)) => { due.insert(key.name, Instant::now()); }
                    Some(Change::All | Change::Namespace(_)) => due.clear(),
                },
                _ = tick.tick() => {}
            }
            if !(self.manager.is_leader)() {
                due.clear();
                continue;
            }
            let plans = self.plans.state();
            due.retain(|name, _| plans.iter().any(|plan| plan.name_any() == *name));
            for plan in plans {
                let name = plan.name_any();
                if due.get(&name).is_some_and(|at| Instant::now() < *at) {
                    continue;
                }
                let pause = self.look(&plan).await.unwrap_or_else(|error| {
                    warn!(plan = name, error, "it is looked at again after a pause");
                    PAUSE
                });
                due.insert(name, Instant::now() + pause);
            }
        }
    }

    /// Brings one plan forward. Returns how long it can be left alone.
    async fn look(&self, plan: &Arc<MigrationPlan>) -> Result<Duration, String> {
        if plan.metadata.deletion_timestamp.is_some() {
            return Ok(REPLAN);
        }
        match &plan.status {
            Some(status) if execute::is_over(status) => Ok(REPLAN),
            Some(status) if matches!(status.phase, Some(Phase::Executing | Phase::Stopped)) => self.step(plan, status).await,
            _ => self.replan(plan).await,
        }
    }

    /// Makes the plan anew; where it is to be carried out, freezes it.
    async fn replan(&self, plan: &Arc<MigrationPlan>) -> Result<Duration, String> {
        let (knowledge, nodes, planned) = (self.manager.knowledge.clone(), self.nodes.state(), Arc::clone(plan));
        // A search may take a while: not on the threads that answer admission.
        let fresh = spawn_blocking(move || {
            let now = Timestamp::now();
            let status = survey::made(&knowledge, &nodes, &planned, now);
            let begins = planned.spec.execute && status.phase == Some(Phase::Planned);
            if begins { execute::begin(&planned, status, now) } else { status }
        });
        let fresh = fresh.await.map_err(|error| format!("planning ended abruptly: {error}"))?;
        let begins = fresh.phase == Some(Phase::Executing);
        if news::matters(plan.status.as_ref(), &fresh, Timestamp::now()) {
            self.write(plan, &fresh).await?;
            debug!(plan = plan.name_any(), phase = ?fresh.phase, "planned");
        }
        // The next step when the watch shows the frozen plan.
        Ok(if begins { STEP } else { REPLAN })
    }

    /// Carries the plan a step further.
    async fn step(&self, plan: &MigrationPlan, stored: &MigrationPlanStatus) -> Result<Duration, String> {
        let now = Timestamp::now();
        let knowledge = &self.manager.knowledge;
        let terms = status::terms(plan, survey::limits(knowledge)).map_err(|error| error.to_string())?;
        let steps = stored.schedule.as_ref().map(|schedule| schedule.steps.as_slice()).unwrap_or_default();
        let facts = survey::facts(knowledge, &self.nodes.state(), plan, steps, now);
        let Advance { mut status, start } = execute::advance(plan, stored, &facts, &survey::others(knowledge, plan), &terms, now);
        for at in start {
            let Some(step) = steps.get(at) else { continue };
            if !(self.manager.is_leader)() {
                break;
            }
            match self.create(plan, at, step).await {
                Ok(Some(migration)) => execute::record(&mut status, migration),
                // It is there already: the watch shows it soon.
                Ok(None) => {}
                Err(Failure::Refused(words)) => {
                    execute::refused(plan, &mut status, &words, now);
                    break;
                }
                Err(Failure::Absent(words)) => {
                    warn!(plan = plan.name_any(), step = at, error = words, "cannot create a migration; it is tried again");
                    break;
                }
            }
        }
        if status != *stored {
            self.write(plan, &status).await?;
        }
        Ok(STEP)
    }

    /// Creates the migration of a step; `None`: there is one already.
    async fn create(&self, plan: &MigrationPlan, at: usize, step: &Step) -> Result<Option<PlannedMigration>, Failure> {
        let name = migration_name(plan, at);
        let resource = ApiResource::erase::<VirtualMachineInstanceMigration>(&());
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &step.namespace, &resource);
        let labels = BTreeMap::from([(names::PLAN_LABEL.to_owned(), plan.uid().unwrap_or_default())]);
        let mut migration = DynamicObject::new(&name, &resource).data(json!({ "spec": { "vmiName": step.name } }));
        migration.metadata.labels = Some(labels);
        let parameters = PostParams { field_manager: Some(names::MANAGER.to_owned()), ..PostParams::default() };
        let result = timeout(PATIENCE, api.create(&parameters, &migration)).await;
        self.manager.writer.count("migration", matches!(result, Ok(Ok(_))));
        match result {
            Ok(Ok(made)) => {
                info!(plan = plan.name_any(), namespace = step.namespace, vm = step.name, migration = name, "created");
                Ok(Some(PlannedMigration {
                    step: at as u64,
                    namespace: step.namespace.clone(),
                    uid: made.uid().unwrap_or_default(),
                    created_at: made.creation_timestamp().or_else(|| Some(Time(Timestamp::now()))),
                    phase: String::new(),
                    name,
                }))
            }
            Ok(Err(kube::Error::Api(status))) if status.is_already_exists() => Ok(None),
            Ok(Err(kube::Error::Api(status))) if (400..500).contains(&status.code) && !matches!(status.code, 408 | 429) => Err(
                Failure::Refused(format!("the migration of {}/{} was refused: {}", step.namespace, step.name, status.message)),
            ),
            Ok(Err(error)) => Err(Failure::Absent(error.to_string())),
            Err(_) => Err(Failure::Absent(format!("the API server did not answer within {} s", PATIENCE.as_secs()))),
        }
    }

    async fn write(&self, plan: &MigrationPlan, status: &MigrationPlanStatus) -> Result<(), String> {
        let name = plan.name_any();
        let body = json!({
            "apiVersion": MigrationPlan::api_version(&()), "kind": MigrationPlan::kind(&()),
            // Only on what was looked at: what two looks write in turn must not be steps of one and migrations of the other.
            "metadata": { "name": name, "resourceVersion": plan.resource_version() }, "status": status,
        });
        let api: Api<MigrationPlan> = Api::all(self.client.clone());
        let parameters = PatchParams::apply(names::MANAGER).force();
        let result = timeout(PATIENCE, api.patch_status(&name, &parameters, &Patch::Apply(&body))).await;
        self.manager.writer.count("plan", matches!(result, Ok(Ok(_))));
        match result {
            Ok(Ok(_)) => Ok(()),
            // The watch shows what it is now, and it is looked at again.
            Ok(Err(kube::Error::Api(status))) if status.is_conflict() => Ok(()),
            Ok(Err(error)) => Err(format!("cannot apply the status of MigrationPlan {name}: {error}")),
            Err(_) => Err(format!("cannot apply the status of MigrationPlan {name}: the API server did not answer")),
        }
    }
}

/// Why a migration was not created.
enum Failure {
    /// Somebody said no.
    Refused(String),
    /// Nobody answered; it is tried again.
    Absent(String),
}
