//! The life of one VM, told with instants instead of a clock.
#![allow(clippy::unwrap_used)]

use serde_json::json;

use super::*;
use crate::{
    api::names::reason,
    model::pattern::{Sample, Traces, Writer},
};

const REFRESH: Duration = Duration::from_secs(600);

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Each generation here is another question, too.
fn object(generation: i64, pod_uid: &str) -> MigrationForecast {
    serde_json::from_value(json!({
        "apiVersion": "migvisor.io/v1alpha1", "kind": "MigrationForecast",
        "metadata": { "name": "vm", "namespace": "ns", "uid": "uid", "generation": generation },
        "spec": { "nodeName": "n", "podUID": pod_uid, "guestMemory": "1Gi", "bandwidth": "0", "bandwidthSource": "Unlimited", "downtimeLimit": format!("{}ms", 300 + generation) }
    }))
    .unwrap()
}

struct Life {
    vm: Vm,
    now: Instant,
    wall: Timestamp,
}

impl Life {
    fn new(object: &MigrationForecast) -> Self {
        let (now, wall) = (Instant::now() + s(100_000), Timestamp::from_second(1_700_000_000).unwrap());
        Self { vm: Vm::new(object, &HostConstants::default(), now, wall, REFRESH), now, wall }
    }

    fn pass(&mut self, seconds: u64) {
        self.now += s(seconds);
        self.wall += k8s_openapi::jiff::SignedDuration::from_secs(seconds.try_into().unwrap());
    }

    fn ask(&mut self, object: &MigrationForecast) {
        self.vm.update(object, &HostConstants::default(), self.now, self.wall, REFRESH);
    }

    fn look(&mut self) {
        self.vm.looked(Seen { pattern: pattern(), at: self.now, measured_at: self.wall }, REFRESH);
    }

    fn fail(&mut self) {
        self.vm.failed(Failure::Broken, "busy".to_owned(), self.now, 1.0);
    }

    fn case(&self) -> Case<Key> {
        self.vm.case(("ns".to_owned(), "vm".to_owned()), self.now)
    }

    /// Answers with a total time and says when it is to be written.
    fn answer(&mut self, total: f64) -> Option<Duration> {
        let status = MigrationForecastStatus {
            question: Some(self.vm.question().fingerprint.clone()),
            measured_at: Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(self.vm.seen().unwrap().measured_at)),
            verdict: Some(Verdict::Converges),
            total_time: Some(crate::api::scalar::Duration::from_ms(total)),
            ..MigrationForecastStatus::default()
        };
        self.vm.answered(status, self.now);
        self.case().write_due.map(|due| due.saturating_duration_since(self.now))
    }

    fn write(&mut self) {
        let status = self.vm.to_write().unwrap().clone();
        self.vm.written(status, self.now);
    }
}

fn pattern() -> Arc<Pattern> {
    let idle = Sample { page: 0, weight: 1.0, zero: false, writer: Writer::Idle };
    Arc::new(Pattern::new(vec![idle], Traces::default(), 1000.0).unwrap())
}

#[test]
fn asked_looked_answered_written_then_quiet_until_the_refresh() {
    let mut life = Life::new(&object(1, "pod"));
    assert!(life.case().wanted_since.is_some() && !life.case().fresh);
    life.look();
    assert!(life.case().fresh);
    assert_eq!(life.answer(1000.0), Some(s(0)));
    life.write();
    let case = life.case();
    assert_eq!((case.wanted_since, case.write_due, case.refresh_due), (None, None, life.now + REFRESH));
}

#[test]
fn little_news_waits_for_the_rewrite_and_news_for_a_gap() {
    let mut life = Life::new(&object(1, "pod"));
    life.look();
    life.answer(1000.0);
    life.write();
    life.pass(2);
    life.look();
    assert_eq!(life.answer(2000.0), Some(s(3)), "at most one write in five seconds");
    life.write();
    life.pass(600);
    life.look();
    assert_eq!(life.answer(2001.0), Some(s(240)), "only the time of the look is new");
    life.pass(1);
    life.vm.wanted_since = Some(life.now);
    life.ask(&object(2, "pod"));
    assert!(life.vm.to_write().is_none(), "an answer to an older question is not written");
    assert_eq!(life.answer(2001.0), Some(s(0)), "a new question is answered at once");
}

#[test]
fn failures_back_off_and_do_not_throw_fresh_data_away() {
    let mut life = Life::new(&object(1, "pod"));
    life.look();
    life.answer(1000.0);
    life.write();
    life.pass(600);
    life.fail();
    let case = life.case();
    assert!(case.fresh && case.wanted_since.is_none(), "the last answer stands");
    assert_eq!(case.look_after, Some(life.now + s(2)));
    life.ask(&object(2, "pod"));
    assert!(life.case().fresh && life.case().wanted_since.is_some(), "the new question is answered from it");
    life.answer(1000.0);
    life.write();
    for pause in [4, 8, 16, 32, 64, 128, 256, 300, 300] {
        life.fail();
        assert_eq!(life.case().look_after, Some(life.now + s(pause)));
    }
    life.pass(601);
    life.fail();
    assert!(!life.case().fresh && life.case().wanted_since.is_some(), "too old: the failure is told");
    life.look();
    assert_eq!((life.case().look_after, life.case().fresh), (None, true));
}

#[test]
fn it_is_unseen_until_a_look_succeeds_or_fails_at_something_that_is_there() {
    let mut life = Life::new(&object(1, "pod"));
    let absent = |life: &mut Life| life.vm.failed(Failure::Absent, "still starting".to_owned(), life.now, 1.0);
    assert!(life.case().unseen);
    absent(&mut life);
    assert_eq!((life.case().unseen, life.case().look_after), (true, Some(life.now + s(2))));
    // What is said of its absence is no answer.
    let words = MigrationForecastStatus::unknown(reason::NOT_MEASURED, "still starting", life.vm.question(), None);
    life.vm.answered(words, life.now);
    life.write();
    assert!(life.case().unseen);
    life.fail();
    assert!(!life.case().unseen, "it is there, and cannot be looked at");
    absent(&mut life);
    life.look();
    assert!(!life.case().unseen);
    // Nor is it unseen to an agent that was started again.
    let mut answered = object(1, "pod");
    life.answer(1000.0);
    life.write();
    answered.status = life.vm.published().cloned();
    assert!(!Life::new(&answered).case().unseen);
    let mut moved = object(2, "other");
    moved.status = answered.status;
    assert!(Life::new(&moved).case().unseen, "that was another question");
}

#[test]
fn a_dry_run_asked_for_is_no_new_question() {
    let mut life = Life::new(&object(1, "pod"));
    life.look();
    life.answer(1000.0);
    life.write();
    let mut asked = object(1, "pod");
    asked.metadata.generation = Some(2);
    asked.spec.dry_run = Some(crate::api::dry_run::DryRun { id: "by-hand".to_owned(), ..Default::default() });
    life.ask(&asked);
    assert_eq!((life.case().wanted_since, life.case().write_due), (None, None), "the answer stands");
    assert_eq!(life.vm.question().generation, 2);
}

#[test]
fn remedies_asked_about_are_answered_and_the_question_stands() {
    let mut life = Life::new(&object(1, "pod"));
    life.look();
    life.answer(1000.0);
    life.write();
    let ask = |life: &mut Life, generation, remedies: serde_json::Value| {
        let mut asked = object(1, "pod");
        asked.metadata.generation = Some(generation);
        asked.spec.remedies = serde_json::from_value(remedies).unwrap();
        life.ask(&asked);
    };
    let answers = |life: &Life| {
        let answers = life.vm.remedies().map(|asked| asked.unknown(""));
        MigrationForecastStatus { remedies: answers, ..life.vm.published().unwrap().clone() }
    };
    ask(&mut life, 2, json!([{ "type": "PostCopy" }]));
    assert!(life.case().wanted_since.is_some(), "answered anew");
    let old = answers(&life);
    ask(&mut life, 3, json!([{ "type": "AutoConverge" }]));
    life.vm.answered(old.clone(), life.now);
    assert!(life.vm.to_write().is_none() && life.case().wanted_since.is_some(), "asked otherwise meanwhile");
    let new = answers(&life);
    life.vm.answered(new, life.now);
    assert_eq!((life.case().wanted_since, life.case().write_due), (None, Some(life.now)), "who asks does not wait");
    life.write();
    ask(&mut life, 4, json!([{ "type": "AutoConverge" }]));
    assert_eq!(life.case().wanted_since, None, "asked the same, nothing to do");
    ask(&mut life, 5, json!([]));
    let none = answers(&life);
    life.vm.answered(none, life.now);
    assert!(life.vm.to_write().is_some_and(|status| status.remedies.is_none()), "withdrawn: taken away");

    // After a restart the same.
    let mut object = object(1, "pod");
    object.spec.remedies = serde_json::from_value(json!([{ "type": "PostCopy" }])).unwrap();
    let measured_at = Timestamp::from_second(1_700_000_000 - 400).unwrap();
    let status = MigrationForecastStatus {
        verdict: Some(Verdict::Fails),
        measured_at: Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(measured_at)),
        ..old
    };
    object.status = Some(status.clone());
    assert_eq!(Life::new(&object).case().wanted_since, None, "answered before");
    object.status = Some(MigrationForecastStatus { remedies: None, ..status });
    assert!(Life::new(&object).case().wanted_since.is_some(), "not answered yet");
}

#[test]
fn another_pod_is_another_vm() {
    let mut life = Life::new(&object(1, "pod"));
    life.look();
    life.ask(&object(1, "pod"));
    assert!(life.vm.seen().is_some());
    life.ask(&object(2, "other"));
    assert!(life.case().recall, "what was kept of the other pod is read");
    assert!(life.vm.seen().is_none() && life.case().wanted_since.is_some());
    // An answer that was computed for the old pod comes too late.
    let late =
        MigrationForecastStatus { question: Some(object(1, "pod").question().fingerprint), ..MigrationForecastStatus::default() };
    life.vm.answered(late, life.now);
    assert!(life.vm.to_write().is_none());
}

#[test]
fn after_a_restart_a_fresh_answer_stands_until_its_refresh() {
    let mut asked = object(3, "pod");
    let measured = Timestamp::from_second(1_700_000_000 - 400).unwrap();
    let question = asked.question();
    let mut status = MigrationForecastStatus::unknown(reason::NOT_MEASURED, "", &question, Some(measured));
    status.verdict = Some(Verdict::Fails);
    asked.status = Some(status.clone());
    let life = Life::new(&asked);
    assert_eq!((life.case().wanted_since, life.case().refresh_due), (None, life.now + s(200)));

    for odd in [
        MigrationForecastStatus { question: Some(object(2, "pod").question().fingerprint), ..status.clone() },
        MigrationForecastStatus { verdict: Some(Verdict::Unknown), ..status.clone() },
        MigrationForecastStatus { measured_at: None, ..status.clone() },
        MigrationForecastStatus::unknown("", "", &question, Some(Timestamp::from_second(1_700_000_000 + 5).unwrap())),
        MigrationForecastStatus::unknown("", "", &question, Some(Timestamp::MIN)),
    ] {
        asked.status = Some(odd);
        assert!(Life::new(&asked).case().wanted_since.is_some());
    }
}

#[test]
fn words_are_written_once() {
    let mut asked = object(1, "pod");
    asked.spec.outside_model = Some("block migration".to_owned());
    let mut life = Life::new(&asked);
    assert!(!life.case().measurable);
    let words = MigrationForecastStatus::unknown(reason::OUTSIDE_MODEL, "block migration", &asked.question(), None);
    life.vm.answered(words.clone(), life.now);
    life.write();
    life.pass(10_000);
    life.vm.answered(words, life.now);
    assert!(life.vm.to_write().is_none());
}

#[test]
fn failed_writes_back_off() {
    let mut life = Life::new(&object(1, "pod"));
    life.look();
    life.answer(1.0);
    for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
        life.vm.write_failed(life.now, 1.0);
        assert_eq!(life.case().write_due, Some(life.now + s(pause)));
    }
}
