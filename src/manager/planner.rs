//! Looks after the plans: makes them, keeps them fresh, carries them out. Only the leader does.
//!
//! In: the plans, and everything else that the manager knows. Out: their status, and the VirtualMachineInstanceMigrations of those that are
//! to be carried out. What should be written is decided by [`super::plan`] and [`super::execute`]; this only reads, writes and waits.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams},
    runtime::reflector::{ObjectRef, Store, store::Writer as Feed},
};
use serde_json::json;
use tokio::{
    sync::mpsc,
    task::spawn_blocking,
    time::{Instant, interval, timeout},
};
use tracing::{debug, info, warn};

use super::{
    Knowledge, Manager,
    apply::PATIENCE,
    execute::{self, Advance, Facts, Seen, migration_name},
    knowledge::Candidate,
    plan::{self, Vm},
    question::{self, Desired, Limits},
    watch::{self, Change},
};
use crate::{
    api::{
        MigrationPlan, MigrationPlanStatus,
        kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration},
        names,
        plan::{Phase, PlannedMigration, Step},
        policy::Selectors,
    },
    decision::{Assessment, Origin},
};

/// A plan that nothing is done about is made anew this often.
const REPLAN: Duration = Duration::from_secs(30);
/// One that is carried out is looked at this often: KubeVirt's progress is not told to anybody.
const STEP: Duration = Duration::from_secs(1);
/// After an error.
const PAUSE: Duration = Duration::from_secs(5);

/// Looks after all plans, for ever.
pub(super) async fn run(client: &Client, manager: &Manager) {
    let feed = Feed::default();
    let plans: Store<MigrationPlan> = feed.as_reader();
    let (sender, changes) = mpsc::unbounded_channel();
    let planner = Planner { client, manager, plans };
    tokio::join!(watch::plans(client, feed, &manager.metrics, &sender), planner.work(changes));
}

struct Planner<'a> {
    client: &'a Client,
    manager: &'a Manager,
    plans: Store<MigrationPlan>,
}

impl Planner<'_> {
    async fn work(&self, mut changes: mpsc::UnboundedReceiver<Change>) {
        self.manager.knowledge.ready().await;
        if self.plans.wait_until_ready().await.is_err() {
            return std::future::pending().await;
        }
        let mut due: HashMap<String, Instant> = HashMap::new();
        let mut tick = interval(STEP);
        loop {
            tokio::select! {
                change = changes.recv() => match change {
                    None => return std::future::pending().await,
                    Some(Change::One(key)) => { due.insert(key.name, Instant::now()); }
                    Some(Change::All) => due.clear(),
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
        let (knowledge, planned) = (self.manager.knowledge.clone(), Arc::clone(plan));
        // A search may take a while: not on the threads that answer admission.
        let fresh = spawn_blocking(move || {
            let now = Timestamp::now();
            let moving = moving(&knowledge);
            let looks: Vec<_> =
                chosen(&knowledge, &planned).into_iter().map(|vmi| Look::at(&knowledge, vmi, &moving, now)).collect();
            let vms: Vec<_> = looks.iter().map(Look::vm).collect();
            let status = plan::status(&planned, &vms, limits(&knowledge), now);
            let begins = planned.spec.execute && status.phase == Some(Phase::Planned);
            if begins { execute::begin(&planned, status, now) } else { status }
        });
        let fresh = fresh.await.map_err(|error| format!("planning ended abruptly: {error}"))?;
        let begins = fresh.phase == Some(Phase::Executing);
        if plan::matters(plan.status.as_ref(), &fresh, Timestamp::now()) {
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
        let terms = plan::terms(plan, limits(knowledge)).map_err(|error| error.to_string())?;
        let steps = stored.schedule.as_ref().map(|schedule| schedule.steps.as_slice()).unwrap_or_default();
        let moving = moving(knowledge);
        let facts: Vec<_> = steps.iter().enumerate().map(|(at, step)| facts(knowledge, plan, (at, step), &moving, now)).collect();
        let Advance { mut status, start } = execute::advance(plan, stored, &facts, &others(knowledge, plan), &terms, now);
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
            // Another plan of this name is none of ours.
            "metadata": { "name": name, "uid": plan.uid() }, "status": status,
        });
        let api: Api<MigrationPlan> = Api::all(self.client.clone());
        let parameters = PatchParams::apply(names::MANAGER).force();
        let result = timeout(PATIENCE, api.patch_status(&name, &parameters, &Patch::Apply(&body))).await;
        self.manager.writer.count("plan", matches!(result, Ok(Ok(_))));
        match result {
            Ok(Ok(_)) => Ok(()),
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

/// KubeVirt's limits, as they are configured now.
fn limits(knowledge: &Knowledge) -> Limits {
    question::limits(knowledge.kubevirt().as_deref())
}

/// The VMs that a plan is about, in order of their names.
fn chosen(knowledge: &Knowledge, plan: &MigrationPlan) -> Vec<Arc<VirtualMachineInstance>> {
    let spec = &plan.spec;
    let everything = Selectors::default();
    let selectors = spec.selectors.as_ref().unwrap_or(&everything);
    let mut vmis = knowledge.vmis.state_filter(|vmi| {
        vmi.status.phase == "Running" && spec.source_node.as_ref().is_none_or(|node| vmi.status.node_name == *node)
    });
    vmis.retain(|vmi| selectors.match_labels(&knowledge.namespace_labels(vmi), vmi.labels()));
    vmis.sort_by_key(|vmi| (vmi.namespace(), vmi.name_any()));
    vmis
}

/// The VMs, by namespace and name, of which a migration is under way.
fn moving(knowledge: &Knowledge) -> HashSet<(String, String)> {
    let under_way = knowledge.migrations.state_filter(VirtualMachineInstanceMigration::is_under_way);
    under_way.iter().map(|migration| (migration.namespace().unwrap_or_default(), migration.spec.vmi_name.clone())).collect()
}

/// A VM with its question and what its answer is worth.
struct Look {
    vmi: Arc<VirtualMachineInstance>,
    desired: Desired,
    assessment: Assessment,
    migrating: bool,
}

impl Look {
    fn at(knowledge: &Knowledge, vmi: Arc<VirtualMachineInstance>, moving: &HashSet<(String, String)>, now: Timestamp) -> Self {
        let (namespace, vmi_name) = (vmi.namespace().unwrap_or_default(), vmi.name_any());
        let desired = knowledge.desired(&vmi, knowledge.policy(&vmi).as_deref());
        let candidate = Candidate { namespace: &namespace, vmi_name: &vmi_name, leaves_cluster: false, origin: Origin::Person };
        let assessment = knowledge.assess(candidate, now);
        let migrating = vmi.is_migrating() || moving.contains(&(namespace, vmi_name));
        Self { vmi, desired, assessment, migrating }
    }

    fn vm(&self) -> Vm<'_> {
        let present = match &self.desired {
            Desired::Ask(spec) => Some(&**spec),
            Desired::Wait | Desired::Nothing => None,
        };
        Vm { vmi: &self.vmi, present, assessment: self.assessment.clone(), migrating: self.migrating }
    }
}

/// What is known of a step now.
fn facts(
    knowledge: &Knowledge,
    plan: &MigrationPlan,
    (at, step): (usize, &Step),
    moving: &HashSet<(String, String)>,
    now: Timestamp,
) -> Facts {
    let vmi = knowledge.vmi(&step.namespace, &step.name).filter(|vmi| vmi.status.phase == "Running");
    let migration = knowledge.migrations.get(&ObjectRef::new(&migration_name(plan, at)).within(&step.namespace));
    let state = vmi.as_ref().and_then(|vmi| vmi.status.migration_state.clone()).filter(|state| state.completed);
    let ours = |migration: &VirtualMachineInstanceMigration| {
        plan.uid().is_some() && migration.labels().get(names::PLAN_LABEL) == plan.metadata.uid.as_ref()
    };
    Facts {
        vm: vmi.as_ref().map(|vmi| (vmi.uid().unwrap_or_default(), vmi.status.node_name.clone())),
        migration: migration.map(|migration| Seen {
            uid: migration.uid().unwrap_or_default(),
            phase: migration.status.phase.clone(),
            ours: ours(&migration),
            created_at: migration.creation_timestamp(),
        }),
        last: state.map(|state| (state.migration_uid, !state.failed)),
        outlook: vmi.map_or_else(
            || Err(plan::Obstacle { reason: names::reason::NO_ANSWER, message: "it does not run".to_owned() }),
            |vmi| Look::at(knowledge, vmi, moving, now).vm().outlook(),
        ),
    }
}

/// Migrations under way that are not this plan's, by the node that they leave.
fn others(knowledge: &Knowledge, plan: &MigrationPlan) -> Vec<(String, usize)> {
    let mut by_node: BTreeMap<String, usize> = BTreeMap::new();
    for migration in knowledge.migrations.state() {
        let ours = migration.labels().get(names::PLAN_LABEL) == plan.metadata.uid.as_ref();
        if !ours && migration.is_under_way() {
            let namespace = migration.namespace().unwrap_or_default();
            let node = knowledge.vmi(&namespace, &migration.spec.vmi_name).map(|vmi| vmi.status.node_name.clone());
            *by_node.entry(node.unwrap_or_default()).or_default() += 1;
        }
    }
    by_node.into_iter().collect()
}
