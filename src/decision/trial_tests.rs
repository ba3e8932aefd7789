//! Dry runs and remedies in decisions: what is held for them, and what becomes of it when they have ended.

use super::*;
use crate::api::{
    dry_run::{Counted, DryRunPhase, DryRunResult, DryRunStatus},
    remedy::{Remedy, RemedyAnswers, RemedyType},
};

/// A policy that enforces, and has what is held tried out.
fn on_demand() -> PredictionPolicy {
    let mut policy = policy(Mode::Enforce);
    policy.spec.dry_run = Some(DryRunPolicy { mode: DryRunMode::OnDemand, ..DryRunPolicy::default() });
    policy
}

/// A dry run of this question that has just come to its end, without a result.
fn ended(present: &MigrationForecastSpec, phase: DryRunPhase) -> DryRunStatus {
    DryRunStatus { completed_at: Some(Time(now())), ..DryRunStatus::new("doubt-1", present.fingerprint(), phase, "it ended") }
}

#[test]
fn what_was_let_through_is_not_denied_for_the_want_of_room() {
    let (mut object, present) = (object(spec(), &model(Verdict::Fails, 0.05), MINUTE), spec());
    let policy = on_demand();
    let asked: DryRun = serde_json::from_value(serde_json::json!({ "id": "doubt-1" })).unwrap();
    object.spec.dry_run = Some(asked.clone());
    let running = DryRunStatus {
        started_at: Some(Time(now())),
        ..DryRunStatus::new(&asked.id, present.fingerprint(), DryRunPhase::Running, "")
    };
    // The policy's deadline is over: what was tried and still would fail is denied, what nobody began to try is not.
    for (run, out_of_time) in [(None, Action::AllowWithWarning), (Some(running), Action::Deny)] {
        object.status.as_mut().unwrap().dry_run = run;
        let input = Input { policy: Some(&policy), stage: Stage::Admitted, ..input(&object, &present, Mode::Enforce) };
        for (room, expected) in [
            (Room::Free, Action::Hold),
            (Room::Full, Action::AllowWithWarning),
            (Room::NoManager, Action::AllowWithWarning),
            (Room::OutOfTime, out_of_time),
        ] {
            assert_eq!(decide(&Input { room, ..input.clone() }).action, expected, "{room:?}");
        }
    }
}

#[test]
fn what_was_let_through_to_be_tried_out_is_not_denied_because_nobody_did() {
    let mut doubtful = object(spec(), &model(Verdict::Borderline, 0.5), MINUTE);
    let (mut object, present) = (object(spec(), &model(Verdict::Fails, 0.05), MINUTE), spec());
    let policy = on_demand();
    let own_deadline = Some(reason::DEADLINE_EXCEEDED);
    for (phase, why, admitted) in [
        (DryRunPhase::Cancelled, None, Action::AllowWithWarning),
        (DryRunPhase::Cancelled, Some("AnythingElse"), Action::AllowWithWarning),
        // It had its time, and did not converge within that.
        (DryRunPhase::Cancelled, own_deadline, Action::Deny),
        (DryRunPhase::Refused, None, Action::Deny),
    ] {
        let ended = DryRunStatus { reason: why.map(str::to_owned), ..ended(&present, phase) };
        object.status.as_mut().unwrap().dry_run = Some(ended);
        for (stage, expected) in [(Stage::Admitted, admitted), (Stage::Request, Action::Deny)] {
            let input = Input { policy: Some(&policy), stage, ..input(&object, &present, Mode::Enforce) };
            let decision = decide(&input);
            assert_eq!(decision.action, expected, "{phase:?} {why:?} {stage:?}");
            let told = decision.message.contains("came to nothing: it ended.");
            assert_eq!(told, stage == Stage::Admitted, "{}", decision.message);
        }
    }
    // What leaves a doubt only is warned of, as without a dry run.
    let ended = DryRunStatus { reason: own_deadline.map(str::to_owned), ..ended(&present, DryRunPhase::Cancelled) };
    doubtful.status.as_mut().unwrap().dry_run = Some(ended);
    let input = Input { policy: Some(&policy), stage: Stage::Admitted, ..input(&doubtful, &present, Mode::Enforce) };
    assert_eq!(decide(&input).action, Action::AllowWithWarning);
}

#[test]
fn a_dry_run_that_ended_without_a_result_is_not_waited_for() {
    let (mut object, present) = (object(spec(), &model(Verdict::Borderline, 0.5), MINUTE), spec());
    let policy = on_demand();
    for (phase, expected) in [
        (DryRunPhase::Waiting, Action::Hold),
        (DryRunPhase::Running, Action::Hold),
        (DryRunPhase::Refused, Action::AllowWithWarning),
        (DryRunPhase::Failed, Action::AllowWithWarning),
        (DryRunPhase::Cancelled, Action::AllowWithWarning),
    ] {
        object.status.as_mut().unwrap().dry_run = Some(ended(&present, phase));
        let input = Input { policy: Some(&policy), ..input(&object, &present, Mode::Enforce) };
        assert_eq!(decide(&input).action, expected, "{phase:?}");
    }
}

/// The agent writes the dry run's result first, the answer that rests on it after that: in between nothing is let go by what the pattern says.
#[test]
fn a_dry_run_that_has_ended_speaks_before_the_answer_does() {
    let (mut object, present) = (object(spec(), &model(Verdict::Borderline, 0.5), MINUTE), spec());
    let policy = on_demand();
    let tried = |verdict, p| {
        let forecast = Forecast { method: Method::DryRun, ..model(verdict, p) };
        let result = Some(DryRunResult::from_forecast(&forecast, Counted::default()));
        DryRunStatus { result, ..ended(&present, DryRunPhase::Done) }
    };
    for (verdict, p, expected) in [
        (Verdict::Fails, 0.0, Action::Deny),
        (Verdict::Converges, 1.0, Action::Allow),
        (Verdict::Borderline, 1.0, Action::AllowWithWarning),
    ] {
        object.status.as_mut().unwrap().dry_run = Some(tried(verdict, p));
        let input = Input { policy: Some(&policy), stage: Stage::Admitted, ..input(&object, &present, Mode::Enforce) };
        let decision = decide(&input);
        assert_eq!((decision.action, decision.verdict), (expected, verdict), "{}", decision.message);
        assert!(decision.message.contains("after a dry run"), "{}", decision.message);
    }
}

#[test]
fn asking_for_a_dry_run_never_outdates_an_answer() {
    let (mut object, present) = (object(spec(), &model(Verdict::Fails, 0.0), MINUTE), spec());
    let before = decide(&input(&object, &present, Mode::Enforce));
    assert_eq!(before.action, Action::Deny);
    // Asked, in the instant before the agent has seen it; while it runs; withdrawn.
    for (generation, id) in [(5, Some("by-hand")), (6, Some("another")), (7, None)] {
        object.metadata.generation = Some(generation);
        object.spec.dry_run = id.map(|id| DryRun { id: id.into(), ..DryRun::default() });
        assert_eq!(decide(&input(&object, &present, Mode::Enforce)), before, "{id:?}");
    }
    // A change to and fro: what was answered for this question is its answer, whatever is written at the moment.
    object.spec.bandwidth = scalar::Quantity("1Gi".into());
    assert_eq!(decide(&input(&object, &present, Mode::Enforce)), before);
}

#[test]
fn a_dry_run_is_named_where_it_speaks() {
    for (verdict, p, says) in [
        (Verdict::Fails, 0.0, "forecasts after a dry run that the live migration of default/wild would fail: at"),
        (
            Verdict::Borderline,
            1.0,
            "forecasts after a dry run that the live migration of default/wild may not converge: at 100 MiB/s it took 3.7 s",
        ),
        (Verdict::Converges, 1.0, "forecasts after a dry run that the live migration of default/wild at 100 MiB/s would take"),
    ] {
        let tried = Forecast { method: Method::DryRun, ..model(verdict, p) };
        let (object, present) = (object(spec(), &tried, MINUTE), spec());
        let decision = decide(&input(&object, &present, Mode::Enforce));
        assert!(decision.message.contains(says), "{}", decision.message);
    }
}

/// Takes a moment and no place; where it cannot be applied the migration goes on, for the next one would fare no better.
#[test]
fn what_a_remedy_would_help_is_held_for_it() {
    let remedies: Vec<Remedy> = serde_json::from_value(serde_json::json!([{ "type": "AutoConverge" }])).unwrap();
    let present = MigrationForecastSpec { remedies, ..spec() };
    let mut object = object(present.clone(), &model(Verdict::Fails, 0.0), MINUTE);
    let answer = |verdict| RemedyAnswer { verdict, ..RemedyAnswer::unknown(RemedyType::AutoConverge, "") };
    for (helps, stage, origin, room, expected) in [
        (Verdict::Converges, Stage::Request, Origin::Person, Room::Free, Action::Hold),
        (Verdict::Converges, Stage::Request, Origin::Person, Room::Full, Action::Hold),
        (Verdict::Converges, Stage::Request, Origin::Evacuation, Room::Full, Action::Hold),
        (Verdict::Converges, Stage::Request, Origin::Person, Room::NoManager, Action::Deny),
        (Verdict::Converges, Stage::Admitted, Origin::Person, Room::Free, Action::Hold),
        (Verdict::Converges, Stage::Admitted, Origin::Person, Room::Passed, Action::AllowWithWarning),
        (Verdict::Converges, Stage::Admitted, Origin::Person, Room::OutOfTime, Action::AllowWithWarning),
        (Verdict::Fails, Stage::Request, Origin::Person, Room::Free, Action::Deny),
        (Verdict::Fails, Stage::Admitted, Origin::Person, Room::Free, Action::Deny),
        (Verdict::Fails, Stage::Request, Origin::Evacuation, Room::Free, Action::AllowWithWarning),
    ] {
        object.status.as_mut().unwrap().remedies = Some(RemedyAnswers {
            asked: present.remedies_fingerprint(),
            measured_at: Some(Time(now())),
            answers: vec![answer(helps)],
        });
        let decision = decide(&Input { origin, room, stage, ..input(&object, &present, Mode::Enforce) });
        assert_eq!(decision.action, expected, "{helps:?} {stage:?} {origin:?} {room:?}");
        assert_eq!(decision.remedy.is_some(), expected == Action::Hold, "{helps:?} {stage:?} {origin:?} {room:?}");
        assert_eq!(decision.message.contains("It is forced"), expected == Action::Hold, "{}", decision.message);
    }
}
