//! A plan that is carried out: its steps, its stops, and a world that loses writes and shows things late.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;

use super::{
    super::status::{
        self,
        tests::{Fixture, LIMITS, now, plan, status_of, vm},
    },
    *,
};

fn planned(execute: bool) -> MigrationPlan {
    plan(&json!({ "sourceNode": "node-1", "want": "Everything", "bandwidth": "100Mi", "execute": execute }))
}

/// Six VMs, two at a time: each is capped at 100 MiB/s, as is the link, and converges from 20 on.
fn vms() -> Vec<Fixture> {
    (0..6).map(|at| vm(&format!("vm-{at}"), 11.0, 20)).collect()
}

fn begun(plan: &MigrationPlan) -> MigrationPlanStatus {
    let mut status = status_of(&serde_json::to_value(&plan.spec).unwrap(), &vms());
    // The fixtures share a link of their own rate: side by side is no quicker, and is asked for here.
    status.schedule.as_mut().unwrap().per_node = 2;
    begin(plan, status, now())
}

fn facts() -> Vec<Facts> {
    let of = |(at, vm): (usize, &Fixture)| Facts {
        vm: Some((format!("uid-vm-{at}"), "node-1".to_owned())),
        migration: None,
        last: None,
        outlook: vm.vm().outlook(),
    };
    vms().iter().enumerate().map(of).collect()
}

fn seen(phase: &str) -> Seen {
    Seen { uid: "u".to_owned(), phase: phase.to_owned(), ours: true, created_at: Some(Time(now())) }
}

fn terms(plan: &MigrationPlan) -> Terms {
    // Half of the link each.
    status::terms(plan, LIMITS).unwrap()
}

/// What a look at a plan that has begun says where one fact is another one.
fn look(change: impl FnOnce(&mut Vec<Facts>, &mut MigrationPlanStatus)) -> (Advance, String) {
    let plan = planned(true);
    let (mut facts, mut status) = (facts(), begun(&plan));
    change(&mut facts, &mut status);
    let advance = advance(&plan, &status, &facts, &[], &terms(&plan), now());
    let reason = advance.status.conditions.iter().find(|condition| condition.type_ == EXECUTED).unwrap().reason.clone();
    (advance, reason)
}

#[test]
fn as_many_as_planned_and_the_next_when_one_is_through() {
    let (first, reason) = look(|_, _| {});
    assert_eq!((first.start, reason.as_str(), first.status.phase), (vec![0, 1], "Executing", Some(Phase::Executing)));
    let (second, _) = look(|facts, _| {
        facts[0].migration = Some(seen("Succeeded"));
        facts[1].migration = Some(seen("Running"));
    });
    assert_eq!(second.start, [2]);
    assert_eq!(second.status.migrations.len(), 2, "what is found is noted, whoever created it");
    let (last, reason) = look(|facts, _| facts.iter_mut().for_each(|facts| facts.migration = Some(seen("Succeeded"))));
    assert_eq!((last.start, reason.as_str(), last.status.phase), (vec![], "Succeeded", Some(Phase::Succeeded)));
    assert!(is_over(&last.status));

    // Everybody's migrations count against the limits.
    let plan = planned(true);
    let busy = |others: &[(&str, usize)], at_once| {
        let others: Vec<_> = others.iter().map(|(node, count)| ((*node).to_owned(), *count)).collect();
        let terms = Terms { at_once, ..terms(&plan) };
        advance(&plan, &begun(&plan), &facts(), &others, &terms, now()).start.len()
    };
    assert_eq!((busy(&[("node-1", 1)], 5), busy(&[("node-1", 2)], 5), busy(&[("node-2", 2)], 5)), (1, 0, 2));
    assert_eq!((busy(&[("node-2", 2)], 3), busy(&[], 1)), (1, 1));
}

#[test]
fn a_plan_stops_when_something_fails_or_the_picture_is_another() {
    type Change = fn(&mut Vec<Facts>, &mut MigrationPlanStatus);
    let cases: [(&str, Change); 9] = [
        ("MigrationFailed", |facts, _| facts[0].migration = Some(seen("Failed"))),
        ("NameTaken", |facts, _| facts[3].migration = Some(Seen { ours: false, ..seen("Running") })),
        ("VmGone", |facts, _| facts[1].vm = None),
        ("VmGone", |facts, _| facts[0].vm = Some(("another".to_owned(), "node-1".to_owned()))),
        ("VmMoved", |facts, _| facts[0].vm = Some(("uid-vm-0".to_owned(), "node-2".to_owned()))),
        ("ForecastChanged", |facts, _| facts[1].outlook = vm("vm-1", 300.0, 70).vm().outlook()),
        ("LinkChanged", |_, status| {
            for step in &mut status.schedule.as_mut().unwrap().steps {
                step.bandwidth = BytesPerSecond(200 << 20).into();
            }
        }),
        ("MigrationDeleted", |_, status| {
            let long_ago = now() - k8s_openapi::jiff::SignedDuration::from_mins(5);
            record(
                status,
                PlannedMigration { uid: "u".to_owned(), created_at: Some(Time(long_ago)), ..PlannedMigration::default() },
            );
        }),
        ("MigrationFailed", |facts, status| {
            facts[0].last = Some(("u".to_owned(), false));
            record(status, PlannedMigration { uid: "u".to_owned(), ..PlannedMigration::default() });
        }),
    ];
    for (expected, change) in cases {
        let (advance, reason) = look(change);
        assert_eq!((reason.as_str(), advance.status.phase), (expected, Some(Phase::Stopped)));
        assert!(advance.start.is_empty(), "{expected}: {:?}", advance.start);
        assert!(is_over(&advance.status), "{expected}");
        // For good, even when the picture is as it was.
        let plan = planned(true);
        let again = super::advance(&plan, &advance.status, &facts(), &[], &terms(&plan), now());
        assert_eq!((again.status.phase, again.start.len()), (Some(Phase::Stopped), 0), "{expected}");
        assert_eq!(again.status.message, advance.status.message, "{expected}");
    }
    let mut status = begun(&planned(true));
    refused(&planned(true), &mut status, "no", now());
    assert_eq!(status.message.as_deref(), Some("Stopped: no."));
}

#[test]
fn a_plan_waits_for_what_nobody_knows_and_pauses_when_told() {
    let unknown = || Err(Obstacle { reason: "StaleData", message: "the VM has not been looked at".to_owned() });
    let (waits, reason) = look(|facts, _| facts.iter_mut().for_each(|facts| facts.outlook = unknown()));
    assert_eq!((reason.as_str(), waits.start.len(), waits.status.phase), ("Waiting", 0, Some(Phase::Executing)));
    assert!(waits.status.message.unwrap().contains("shop/vm-0 waits: the VM has not been looked at"));
    let (others, _) = look(|facts, _| facts[0].outlook = unknown());
    assert_eq!(others.start, [1, 2], "the others need not wait");
    // Just created, and the watch does not show it yet.
    let (young, _) = look(|_, status| {
        record(status, PlannedMigration { uid: "u".to_owned(), created_at: Some(Time(now())), ..PlannedMigration::default() });
    });
    assert_eq!((young.start, young.status.phase), (vec![1], Some(Phase::Executing)));

    let plan = planned(false);
    let mut running = facts();
    running[0].migration = Some(seen("Running"));
    let paused = advance(&plan, &begun(&plan), &running, &[], &terms(&plan), now());
    assert_eq!((paused.start.len(), paused.status.migrations.len()), (0, 1));
    assert!(paused.status.message.unwrap().contains("execute is false"));
}

/// What the API server has, for each name: the phase, and how often it was created.
type World = BTreeMap<String, (String, u32)>;

proptest! {
    /// A manager that is killed at any point, whose writes get lost and whose watch shows old pictures, creates each migration once, and
    /// never has more under way than planned; left alone it comes to the end.
    #[test]
    fn interrupted_anywhere_it_creates_nothing_twice(course in prop::collection::vec((0..4_u8, 0..6_usize, 0..3_usize), 0..80)) {
        let plan = planned(true);
        let (mut stored, mut world) = (begun(&plan), World::new());
        let mut pictures = vec![(stored.clone(), world.clone())];
        // Left alone at the end: fresh pictures, no losses, everything ends.
        let peace = (0..40).map(|at| (0, at % 6, 0));
        for (what, at, age) in course.into_iter().chain(peace) {
            // One migration gets further.
            if let Some((phase, _)) = world.get_mut(&migration_name(&plan, at)) {
                *phase = if phase == "Running" { "Succeeded".to_owned() } else if phase == "Succeeded" { phase.clone() } else { "Running".to_owned() };
            }
            pictures.push((stored.clone(), world.clone()));
            let (old_status, old_world) = &pictures[pictures.len().saturating_sub(1 + age)];
            let mut facts = facts();
            for (at, facts) in facts.iter_mut().enumerate() {
                if let Some((phase, _)) = old_world.get(&migration_name(&plan, at)) {
                    facts.migration = Some(seen(phase));
                    if phase == "Succeeded" {
                        facts.vm = Some((format!("uid-vm-{at}"), "node-2".to_owned()));
                    }
                }
            }
            let mut advance = advance(&plan, old_status, &facts, &[], &terms(&plan), now());
            for (done, at) in advance.start.iter().enumerate() {
                // Killed between two writes.
                if what == 1 && done == 1 {
                    break;
                }
                let entry = world.entry(migration_name(&plan, *at)).or_default();
                if entry.1 == 0 {
                    *entry = ("Pending".to_owned(), 1);
                    let made = PlannedMigration { step: *at as u64, uid: "u".to_owned(), created_at: Some(Time(now())), ..PlannedMigration::default() };
                    record(&mut advance.status, made);
                }
            }
            // Killed before the status, or the write got lost.
            if what == 0 || what == 3 {
                stored = advance.status;
            }
            let under_way = world.values().filter(|(phase, _)| phase != "Succeeded").count();
            prop_assert!(under_way <= 2, "{under_way} at a time");
        }
        prop_assert_eq!(world.len(), 6);
        prop_assert_eq!(stored.phase, Some(Phase::Succeeded), "{:?}", stored.message);
    }
}
