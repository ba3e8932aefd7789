//! The decision by table, and the race of two processes simulated with clocks that disagree.
#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;

use super::*;

fn options(identity: &str) -> LeaseOptions {
    LeaseOptions::new("migvisor", "migvisor-controller", identity)
}

fn lease(version: u32, holder: &str) -> Lease {
    Lease {
        metadata: ObjectMeta { resource_version: Some(version.to_string()), ..ObjectMeta::default() },
        spec: Some(LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(15),
            lease_transitions: Some(3),
            ..LeaseSpec::default()
        }),
    }
}

fn written(step: Step) -> LeaseSpec {
    match step {
        Step::Write(spec) => *spec,
        Step::Wait => panic!("waits"),
    }
}

fn at(now: Instant, seconds: u64) -> Instant {
    now + Duration::from_secs(seconds)
}

#[tokio::test]
async fn takes_what_is_free_renews_its_own_waits_for_others() {
    let (now, wall) = (Instant::now(), Timestamp::now());
    let me = options("a");
    assert_eq!(written(decide(&me, None, now, wall)).lease_transitions, Some(0));
    let free = observe(None, &lease(1, ""), now);
    let spec = written(decide(&me, Some(&free), now, wall));
    assert_eq!((spec.holder_identity.as_deref(), spec.lease_transitions), (Some("a"), Some(4)));
    let own = observe(None, &lease(1, "a"), now);
    assert_eq!(written(decide(&me, Some(&own), now, wall)).lease_transitions, Some(3));
    let other = observe(None, &lease(1, "b"), now);
    assert_eq!(decide(&me, Some(&other), at(now, 14), wall), Step::Wait);
    assert_eq!(written(decide(&me, Some(&other), at(now, 15), wall)).lease_transitions, Some(4));
}

#[tokio::test]
async fn a_renewal_starts_the_patience_anew_whatever_times_are_written() {
    let now = Instant::now();
    let seen = observe(None, &lease(1, "b"), now);
    let same = observe(Some(seen.clone()), &lease(1, "b"), at(now, 10));
    assert_eq!(same.since, now);
    // The holder's clock is years behind: only that the version moved counts.
    let mut renewed = lease(2, "b");
    renewed.spec.as_mut().unwrap().renew_time = Some(MicroTime(Timestamp::UNIX_EPOCH));
    let renewed = observe(Some(same), &renewed, at(now, 10));
    assert_eq!(decide(&options("a"), Some(&renewed), at(now, 24), Timestamp::now()), Step::Wait);
}

#[tokio::test]
async fn leadership_ends_by_itself_when_nobody_renews() {
    let (state, receiver) = watch::channel(None);
    let (_anyone, anyones) = watch::channel(None);
    let mut leadership = Leadership { ours: receiver, anyones };
    assert!(!leadership.is_leader());
    state.send_replace(Some(Instant::now() + Duration::from_millis(50)));
    assert!(leadership.is_leader());
    leadership.lost().await;
    assert!(!leadership.is_leader());
    drop(state);
    leadership.lost().await;
}

/// A Lease as the API server keeps it, and two processes that write it only on the version they read.
struct Race {
    version: u32,
    stored: Lease,
    seen: [Option<Observed>; 2],
    leads_until: [Option<Instant>; 2],
}

impl Race {
    fn step(&mut self, who: usize, now: Instant, wall: Timestamp) {
        let me = options(["a", "b"][who]);
        let observed = observe(self.seen[who].take(), &self.stored, now);
        self.seen[who] = Some(observed.clone());
        match decide(&me, Some(&observed), now, wall) {
            Step::Write(spec) => {
                self.version += 1;
                self.stored.metadata.resource_version = Some(self.version.to_string());
                self.stored.spec = Some(*spec);
                self.leads_until[who] = Some(now + me.renew_deadline);
            }
            Step::Wait => self.leads_until[who] = None,
        }
    }
}

proptest! {
    /// Whichever of the two gets through when, for how long the other is silent, and whatever their wall clocks say:
    /// never do both believe that they lead.
    #[test]
    fn never_two_leaders(rounds in prop::collection::vec((0_usize..2, 0_u64..20_000, -10_000_i64..10_000), 1..200)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let _inside = runtime.enter();
        let mut now = Instant::now();
        let mut race = Race { version: 1, stored: lease(1, ""), seen: [None, None], leads_until: [None, None] };
        for (who, pause, skew) in rounds {
            now += Duration::from_millis(pause);
            race.step(who, now, Timestamp::from_second(1_700_000_000 + skew).unwrap());
            let leading = race.leads_until.iter().flatten().filter(|until| now < **until).count();
            prop_assert!(leading <= 1);
        }
    }
}
