//! Tables of what a plan says.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::{super::news::matters, *};
use crate::{
    api::MigrationForecastSpec,
    api::kubevirt::VirtualMachineInstance,
    decision::Assessment,
    model::{
        forecast::{Bounds, Forecast, Method},
        units::MilliCpus,
    },
};

const MIB: u64 = 1 << 20;

pub(in crate::manager::plan) fn now() -> Timestamp {
    "2026-11-22T12:00:00Z".parse().unwrap()
}

pub(in crate::manager::plan) fn plan(spec: &Value) -> MigrationPlan {
    let object = json!({
        "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationPlan",
        "metadata": { "name": "p", "uid": "0b7b5d0e-6c3a-4f6b-9f1f-2f6b7a1d9a10", "generation": 1 }, "spec": spec,
    });
    serde_json::from_value(object).unwrap()
}

/// A VM of one GiB and two processors on `node-1`, capped at 100 MiB/s; `lcb` MiB/s are the least at which it converges.
pub(in crate::manager::plan) struct Fixture {
    vmi: VirtualMachineInstance,
    present: Option<MigrationForecastSpec>,
    assessment: Assessment,
    migrating: bool,
    no_room: Option<String>,
}

pub(in crate::manager::plan) fn vm(name: &str, seconds: f64, lcb: u64) -> Fixture {
    let vmi = json!({
        "metadata": { "name": name, "namespace": "shop", "uid": format!("uid-{name}") },
        "spec": { "domain": { "cpu": { "cores": 2 }, "memory": { "guest": "1Gi" } } },
        "status": { "phase": "Running", "nodeName": "node-1" }
    });
    let present = json!({
        "nodeName": "node-1", "podUID": "pod-1", "guestMemory": "1Gi", "bandwidth": "100Mi", "bandwidthSource": "MigrationConfiguration",
        "downtimeLimit": "300ms", "timeBudget": "300s"
    });
    let converges = lcb <= 100;
    let forecast = Forecast {
        verdict: if converges { Verdict::Converges } else { Verdict::Fails },
        sla_exceeded: false,
        low_confidence: false,
        probability: if converges { 1.0 } else { 0.0 },
        method: Method::PatternCollector,
        iterations: 3,
        convergence_ms: seconds * 1000.0,
        downtime_ms: converges.then_some(100.0),
        total_ms: seconds * 1000.0,
        dirtied_pages: 300_000,
        transferred_bytes: 0,
        least_convergent_bandwidth: Some(lcb * MIB),
        cost: None,
        bounds: Bounds::default(),
        pattern: None,
        profile: Vec::new(),
        baselines: Vec::new(),
    };
    Fixture {
        vmi: serde_json::from_value(vmi).unwrap(),
        present: Some(serde_json::from_value(present).unwrap()),
        assessment: Assessment::Known(Box::new(forecast)),
        migrating: false,
        no_room: None,
    }
}

impl Fixture {
    pub(in crate::manager::plan) fn vm(&self) -> Vm<'_> {
        Vm {
            vmi: &self.vmi,
            present: self.present.as_ref(),
            assessment: self.assessment.clone(),
            migrating: self.migrating,
            no_room: self.no_room.clone(),
        }
    }
}

pub(in crate::manager::plan) const LIMITS: Limits = Limits { per_node: 2, at_once: 5 };

pub(in crate::manager::plan) fn status_of(spec: &Value, vms: &[Fixture]) -> MigrationPlanStatus {
    let vms: Vec<_> = vms.iter().map(Fixture::vm).collect();
    status(&plan(spec), &vms, LIMITS, now())
}

fn whole_node() -> Value {
    json!({ "sourceNode": "node-1", "want": "Everything", "bandwidth": "100Mi" })
}

fn names(status: &MigrationPlanStatus) -> Vec<&str> {
    status.schedule.iter().flat_map(|schedule| &schedule.steps).map(|step| step.name.as_str()).collect()
}

fn reason_of<'a>(status: &'a MigrationPlanStatus, name: &str) -> Option<&'a str> {
    status.candidates.iter().find(|candidate| candidate.name == name).unwrap().reason.as_deref()
}

#[test]
fn everybody_is_listed_and_who_cannot_go_has_a_reason() {
    let mut vms = [
        vm("calm", 11.0, 20),
        vm("wild", 300.0, 180),
        vm("stuck", 11.0, 20),
        vm("unseen", 11.0, 20),
        vm("moving", 9.0, 20),
        vm("tied", 9.0, 20),
    ];
    let no = json!([{ "type": "LiveMigratable", "status": "False", "reason": "SEV", "message": "SEV VMs cannot be migrated" }]);
    (vms[2].vmi.status.conditions, vms[2].present) = (serde_json::from_value(no).unwrap(), None);
    vms[3].assessment = Assessment::Unknown(reason::NO_ANSWER, "no agent has answered yet".to_owned());
    vms[4].migrating = true;
    vms[5].no_room = Some("there is no other node".to_owned());
    let status = status_of(&whole_node(), &vms);
    assert_eq!((status.phase, names(&status)), (Some(Phase::Planned), vec!["calm"]));
    assert_eq!(status.candidates.len(), 6);
    assert_eq!((status.candidates[0].rank, reason_of(&status, "calm")), (Some(1), None));
    assert_eq!(reason_of(&status, "wild"), Some(reason::BUDGET_EXCEEDED));
    assert_eq!(reason_of(&status, "stuck"), Some(reason::NOT_MIGRATABLE));
    assert_eq!(reason_of(&status, "unseen"), Some(reason::NO_ANSWER));
    assert_eq!(reason_of(&status, "moving"), Some(reason::MIGRATING));
    assert_eq!(reason_of(&status, "tied"), Some(reason::NO_NODE));
    let wild = status.candidates.iter().find(|candidate| candidate.name == "wild").unwrap();
    assert_eq!(wild.message.as_deref(), Some("at 100 MiB/s it would not converge; it needs at least 180 MiB/s"));
    assert_eq!((wild.verdict, wild.cost), (Some(Verdict::Fails), None));
}

#[test]
fn a_plan_says_what_it_would_do_and_what_that_saves() {
    let vms = [vm("a", 11.0, 20), vm("b", 22.0, 20), vm("c", 33.0, 20), vm("wild", 300.0, 180)];
    let status = status_of(
        &json!({ "sourceNode": "node-1", "want": "CheapestSet", "free": { "memory": "2Gi" }, "bandwidth": "100Mi" }),
        &vms,
    );
    let (selection, saving) = (status.selection.clone().unwrap(), status.saving.clone().unwrap());
    assert_eq!(names(&status), ["a", "b"]);
    assert_eq!((selection.vms, selection.memory.0.as_str(), selection.cpu.0.as_str()), (2, "2Gi", "4"));
    assert!((selection.cost - selection.least_cost).abs() < 1e-9);
    assert!(selection.cost < saving.random_cost.unwrap() && saving.random_cost.unwrap() < saving.everything_cost);
    // Two of four, of which one fails.
    assert!((saving.random_failure.unwrap() - 0.5).abs() < 1e-3);
    let message = status.message.clone().unwrap();
    assert!(
        message.starts_with("Moves 2 VMs, one at a time from each node, in 33 s; frees 2.0 GiB of memory and 4 processors"),
        "{message}"
    );
    assert!(status.conditions[0].type_ == PLANNED && status.conditions[0].status == "True");

    let too_much = status_of(
        &json!({ "sourceNode": "node-1", "want": "CheapestSet", "free": { "memory": "4Gi" }, "bandwidth": "100Mi" }),
        &vms,
    );
    assert_eq!((too_much.phase, too_much.schedule), (Some(Phase::NoSolution), None));
    let message = too_much.message.unwrap();
    assert!(
        message.contains("all eligible VMs together free 3.0 GiB") && message.contains("4.0 GiB and 0 processors are wanted"),
        "{message}"
    );
    let unreadable = status_of(&json!({ "sourceNode": "n", "want": "Cheapest", "free": { "cpu": "many" } }), &vms);
    assert!(unreadable.message.unwrap().contains("spec.free.cpu: `many` is not a number of processors"));
}

#[test]
fn kubevirts_limits_and_the_plans_own_hold() {
    let limited = |spec: &Value| terms(&plan(spec), Limits { per_node: 3, at_once: 7 }).unwrap();
    let own = limited(&json!({ "want": "Everything", "parallelism": 2, "bandwidth": "1Gi", "bandwidthPerMigration": "64Mi" }));
    assert_eq!((own.per_node, own.at_once), (2, 7));
    assert_eq!((own.link, own.cap), (Some(BytesPerSecond(1 << 30)), Some(BytesPerSecond(64 << 20))));
    let theirs = limited(&json!({ "want": "Everything", "parallelism": 9 }));
    assert_eq!((theirs.per_node, theirs.link), (3, None));
}

#[test]
fn no_more_candidates_than_an_object_holds() {
    let vms: Vec<_> = (0..MOST + 20).map(|at| vm(&format!("vm-{at:03}"), 11.0, if at < 10 { 20 } else { 180 })).collect();
    let status = status_of(&whole_node(), &vms);
    assert_eq!((status.candidates.len(), status.omitted), (MOST, Some(20)));
    assert_eq!(status.candidates.iter().filter(|candidate| candidate.rank.is_some()).count(), 10);
    let all: Vec<_> = (0..=MOST).map(|at| vm(&format!("vm-{at:03}"), 11.0, 20)).collect();
    let status = status_of(&whole_node(), &all);
    assert_eq!(status.phase, Some(Phase::NoSolution), "{:?}", status.message);
    assert!(status.message.unwrap().contains("501 VMs are more than the 500"));
}

#[test]
fn noise_is_not_written_and_news_are() {
    let vms = |seconds: f64| [vm("a", seconds, 20), vm("b", 22.0, 20)];
    let stored = status_of(&whole_node(), &vms(11.0));
    let later = |minutes: i64| now() + k8s_openapi::jiff::SignedDuration::from_mins(minutes);
    let worth = |fresh: &MigrationPlanStatus, minutes| matters(Some(&stored), fresh, later(minutes));
    assert!(matters(None, &stored, now()));
    assert!(!worth(&stored, 60), "nothing changed");
    let noise = status_of(&whole_node(), &vms(11.1));
    assert!(!worth(&noise, 1) && worth(&noise, 16), "noise waits");
    assert!(worth(&status_of(&whole_node(), &vms(14.0)), 1));
    let mut gone = vms(11.0);
    gone[0].migrating = true;
    assert!(worth(&status_of(&whole_node(), &gone), 1));
}

#[test]
fn processors_are_what_is_requested_else_what_there_are() {
    let mut vm = vm("a", 11.0, 20);
    assert_eq!(vm.vm().cpu(), MilliCpus(2000));
    vm.vmi.spec.domain.cpu.sockets = Some(3);
    assert_eq!(vm.vm().cpu(), MilliCpus(6000));
    vm.vmi.spec.domain.resources.requests.insert("cpu".to_owned(), Quantity("500m".to_owned()));
    assert_eq!(vm.vm().cpu(), MilliCpus(500));
}
