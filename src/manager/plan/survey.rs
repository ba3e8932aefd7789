//! What a plan has to know, gathered from everything that is known. No I/O.
//!
//! In: the stores of [`Knowledge`], a plan. Out: the status that it should have; where it is carried out, the facts about each step.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use k8s_openapi::jiff::Timestamp;
use kube::{ResourceExt, runtime::reflector::ObjectRef};

use super::{
    execute::{Facts, Seen, migration_name},
    room, status,
    vm::{Obstacle, Vm},
};
use crate::{
    api::{
        MigrationPlan, MigrationPlanStatus,
        kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration},
        names,
        node::Node,
        plan::Step,
        policy::Selectors,
    },
    decision::{self, Assessment},
    manager::{
        knowledge::Knowledge,
        question::{self, Desired, Limits},
    },
};

/// The status of a plan of which nothing has been carried out, from what is known now.
pub fn made(knowledge: &Knowledge, nodes: &[Arc<Node>], plan: &MigrationPlan, now: Timestamp) -> MigrationPlanStatus {
    let scene = Scene { knowledge, nodes, moving: moving(knowledge), now };
    let looks: Vec<_> = chosen(knowledge, plan).into_iter().map(|vmi| Look::at(&scene, vmi)).collect();
    let vms: Vec<_> = looks.iter().map(Look::vm).collect();
    status::status(plan, &vms, limits(knowledge), now)
}

/// What is known of each step now.
pub(super) fn facts(
    knowledge: &Knowledge,
    nodes: &[Arc<Node>],
    plan: &MigrationPlan,
    steps: &[Step],
    now: Timestamp,
) -> Vec<Facts> {
    let scene = Scene { knowledge, nodes, moving: moving(knowledge), now };
    steps.iter().enumerate().map(|(at, step)| facts_of(&scene, plan, at, step)).collect()
}

/// KubeVirt's limits, as they are configured now.
pub(super) fn limits(knowledge: &Knowledge) -> Limits {
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

/// What every look needs.
struct Scene<'a> {
    knowledge: &'a Knowledge,
    nodes: &'a [Arc<Node>],
    moving: HashSet<(String, String)>,
    now: Timestamp,
}

/// A VM with its question and what its answer is worth.
struct Look {
    vmi: Arc<VirtualMachineInstance>,
    desired: Desired,
    assessment: Assessment,
    migrating: bool,
    no_room: Option<String>,
}

impl Look {
    fn at(scene: &Scene<'_>, vmi: Arc<VirtualMachineInstance>) -> Self {
        let knowledge = scene.knowledge;
        let (namespace, vmi_name) = (vmi.namespace().unwrap_or_default(), vmi.name_any());
        let desired = knowledge.desired(&vmi, knowledge.policy(&vmi).as_deref());
        let present = match &desired {
            Desired::Ask(spec) => Some(&**spec),
            Desired::Wait | Desired::Nothing => None,
        };
        let assessment = decision::assess(knowledge.forecast(&namespace, &vmi_name).as_deref(), present, scene.now);
        let migrating = vmi.is_migrating() || scene.moving.contains(&(namespace, vmi_name));
        let no_room = room::lacking(&vmi, scene.nodes);
        Self { vmi, desired, assessment, migrating, no_room }
    }

    fn vm(&self) -> Vm<'_> {
        let present = match &self.desired {
            Desired::Ask(spec) => Some(&**spec),
            Desired::Wait | Desired::Nothing => None,
        };
        Vm {
            vmi: &self.vmi,
            present,
            assessment: self.assessment.clone(),
            migrating: self.migrating,
            no_room: self.no_room.clone(),
        }
    }
}

fn facts_of(scene: &Scene<'_>, plan: &MigrationPlan, at: usize, step: &Step) -> Facts {
    let knowledge = scene.knowledge;
    let vmi = knowledge.vmi(&step.namespace, &step.name).filter(|vmi| vmi.status.phase == "Running");
    let migration = knowledge.migrations.get(&ObjectRef::new(&migration_name(plan, at)).within(&step.namespace));
    let state = vmi.as_ref().and_then(|vmi| vmi.status.migration_state.clone()).filter(|state| state.completed);
    let ours = |migration: &VirtualMachineInstanceMigration| {
        migration.spec.vmi_name == step.name
            && plan.uid().is_some()
            && migration.labels().get(names::PLAN_LABEL) == plan.metadata.uid.as_ref()
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
            || Err(Obstacle { reason: names::reason::NO_ANSWER, message: "it does not run".to_owned() }),
            |vmi| Look::at(scene, vmi).vm().outlook(),
        ),
    }
}

/// Migrations under way that are not this plan's, by the node that they leave.
pub(super) fn others(knowledge: &Knowledge, plan: &MigrationPlan) -> Vec<(String, usize)> {
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
