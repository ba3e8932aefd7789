//! What counts as a rate, what odd observations can do, and that nothing is lost or grows over restarts.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::{
    book::{ENOUGH, REMEMBERED, SWITCHOVERS, TAUGHT, WINDOW},
    *,
};

const MIB: u64 = 1 << 20;
const DAY: u64 = 24 * 3600;
const NOW: u64 = 20_000 * DAY;

/// 1 GiB in 10 s, with nothing else in the way.
fn transfer() -> Transfer {
    Transfer {
        wire: Bytes(1025 * MIB),
        pages: 1 << 18,
        zero_pages: 1000,
        total: Duration::from_secs(10),
        cap: Bandwidth::Unlimited,
    }
}

fn rate(from: &str, to: &str, at: u64, mib: u64) -> Lesson {
    Lesson::Rate { from: from.into(), to: to.into(), at, rate: BytesPerSecond(mib * MIB) }
}

/// In MiB/s, once all of this was learned of migrations from `a` to `b`.
fn learned(rates: &[u64]) -> Option<u64> {
    let mut book = Book::default();
    for mib in rates {
        book.learn(&rate("a", "b", NOW, *mib));
    }
    book.settle(NOW);
    in_mib(&book, "a")
}

fn in_mib(book: &Book, node: &str) -> Option<u64> {
    book.line_rate(node).map(|rate| rate.0 / MIB)
}

#[test]
fn a_rate_counts_only_where_the_line_set_the_pace() {
    let of = |change: fn(&mut Transfer)| {
        let mut sent = transfer();
        change(&mut sent);
        sent.line_rate().map(|rate| rate.0 / MIB)
    };
    assert_eq!(of(|_| ()), Some(102));
    // Near the cap it is the cap's; multifd does not honour it, and goes beyond.
    for (cap, counts) in [(1000, true), (140, true), (130, false), (100, false), (60, false)] {
        let capped = Transfer { cap: Bandwidth::Capped(BytesPerSecond(cap * MIB)), ..transfer() };
        assert_eq!(capped.line_rate().is_some(), counts, "{cap}");
    }
    assert_eq!(of(|sent| sent.zero_pages = 3_000_000), None, "zero pages took a sixth of the time");
    assert_eq!(of(|sent| sent.wire = Bytes(500 * MIB)), None, "compressed");
    assert_eq!(of(|sent| sent.total = Duration::from_millis(900)), None, "too short");
    assert_eq!(of(|sent| sent.pages = 4000), None, "too little");
    // What a hostile QEMU may say is no line and no panic.
    assert_eq!(of(|sent| sent.wire = Bytes(u64::MAX)), None);
    assert_eq!(of(|sent| sent.pages = u64::MAX), None);
    assert_eq!(of(|sent| sent.total = Duration::MAX), None);
}

#[test]
fn a_few_observations_swing_nothing() {
    assert_eq!(learned(&[100; ENOUGH - 1]), None);
    assert_eq!(learned(&[100; ENOUGH]), Some(100));
    assert_eq!(learned(&[100, 100, 100, 100, 100, 5, 5, 5, 5]), Some(100), "four odd ones in nine");
    assert_eq!(learned(&[100, 100, 100, 100, 100, 900, 900, 900, 900]), Some(100));
    assert_eq!(learned(&[100, 100, 100, 100, 5, 5, 5, 5, 5]), Some(5), "the line has become slow");
    assert_eq!(learned(&[5, 5, 5, 5, 5, 5, 5, 5, 5, 100, 100, 100, 100, 100]), Some(100), "and fast again: the last nine count");
}

#[test]
fn no_migration_teaches_twice() {
    let mut book = Book::default();
    for _ in 0..ENOUGH {
        book.learn_from("m", &[rate("a", "b", NOW, 100)]);
    }
    book.settle(NOW);
    assert_eq!(in_mib(&book, "a"), None, "once");
    let mut book = Book::read(&book.text(usize::MAX).unwrap()).unwrap();
    book.learn_from("m", &vec![rate("a", "b", NOW, 100); ENOUGH]);
    book.settle(NOW);
    assert_eq!(in_mib(&book, "a"), None, "nor after a restart");
    // Those without a name are not told apart, and those that taught nothing take no place.
    for _ in 1..ENOUGH {
        book.learn_from("", &[rate("a", "b", NOW, 100)]);
        book.learn_from("idle", &[]);
    }
    book.settle(NOW);
    assert_eq!(in_mib(&book, "a"), Some(100));
    assert!(!book.text(usize::MAX).unwrap().contains("idle"));
    for migration in 0..=TAUGHT {
        book.learn_from(&format!("m{migration}"), &[rate("a", "b", NOW, 100)]);
    }
    let text = book.text(usize::MAX).unwrap();
    assert!(!text.contains("\"m0\"") && text.contains("\"m1\""), "it is bounded");
    assert_eq!(Book::read(&text).unwrap(), book);
    // What was kept before migrations were noted is read.
    let before = Book::default().text(usize::MAX).unwrap().replace(",\"taught\":[]", "");
    assert_eq!(Book::read(&before).unwrap(), Book::default());
}

#[test]
fn a_nodes_rate_is_a_low_quantile_of_its_pairs() {
    let mut book = Book::default();
    for (to, mib) in [("b", 100), ("c", 80), ("d", 300)] {
        for _ in 0..ENOUGH {
            book.learn(&rate("a", to, NOW, mib));
        }
    }
    // Five pairs with one or two rates each count as one more, which has seven.
    for (to, mib) in [("e", 50), ("e", 60), ("f", 70), ("g", 60), ("g", 60), ("h", 900), ("i", 1)] {
        book.learn(&rate("a", to, NOW, mib));
    }
    book.learn(&rate("z", "a", NOW, 1));
    book.settle(NOW);
    assert_eq!((in_mib(&book, "a"), in_mib(&book, "z"), in_mib(&book, "b")), (Some(60), None, None));

    let mut large = Book::default();
    for target in 0..21_u64 {
        for _ in 0..ENOUGH {
            large.learn(&rate("a", &format!("n{target}"), NOW, 100 + target));
        }
    }
    large.settle(NOW);
    assert_eq!(in_mib(&large, "a"), Some(102), "two of twenty-one are slower");
}

#[test]
fn what_is_in_force_changes_only_when_that_is_worth_asking_everybody_anew() {
    let mut book = Book::default();
    let mut learn = |mib: u64| {
        for _ in 0..WINDOW {
            book.learn(&rate("a", "b", NOW, mib));
        }
        book.settle(NOW);
        in_mib(&book, "a")
    };
    assert_eq!([100, 109, 91, 111, 105].map(&mut learn), [100, 100, 100, 111, 111].map(Some));
    assert_eq!(learn(90), Some(90));
}

#[test]
fn what_is_old_is_forgotten() {
    let mut book = Book::default();
    for _ in 0..ENOUGH {
        book.learn(&rate("a", "b", NOW - 29 * DAY, 100));
    }
    book.settle(NOW);
    assert_eq!((in_mib(&book, "a"), book.pairs()), (Some(100), 1));
    book.settle(NOW + 2 * DAY);
    assert_eq!((in_mib(&book, "a"), book.pairs()), (None, 0));
    assert_eq!(book, Book::default());
}

#[test]
fn a_bias_is_the_median_of_each_method_and_figure() {
    let mut book = Book::default();
    let mut err = |method, figure, real: f64, forecast: f64| {
        if let Some(lesson) = Lesson::error(method, figure, real, forecast) {
            book.learn(&lesson);
        }
        book.bias(method, figure)
    };
    let pc = Method::PatternCollector;
    for real in [110.0, 110.0, 1e300, 110.0] {
        assert_eq!(err(pc, Figure::TotalTime, real, 100.0), None, "too few");
    }
    assert_eq!(err(pc, Figure::TotalTime, 1.0, 100.0), Some(0.0953));
    for (real, forecast) in [(0.0, 1.0), (1.0, 0.0), (-1.0, -1.0), (f64::NAN, 1.0), (f64::INFINITY, 1.0)] {
        assert_eq!(err(pc, Figure::Downtime, real, forecast), None);
    }
    assert_eq!(Lesson::error(pc, Figure::Pages, 0.0, 5.0), None);
    for _ in 0..2 * REMEMBERED {
        err(Method::DryRun, Figure::Pages, 1.0, 1.0);
    }
    assert_eq!((book.bias(Method::DryRun, Figure::Pages), book.bias(pc, Figure::Pages)), (Some(0.0), None));
    assert!(book.text(usize::MAX).unwrap().len() < 1000, "it is bounded");
}

#[test]
fn a_book_outlives_a_restart_and_reads_nothing_else() {
    let mut book = Book::default();
    for _ in 0..ENOUGH {
        book.learn(&rate("node-a", "node-b", NOW, 100));
        book.learn(&Lesson::error(Method::DryRun, Figure::Downtime, 3.0, 2.0).unwrap());
    }
    book.settle(NOW);
    let text = book.text(usize::MAX).unwrap();
    assert_eq!(Book::read(&text).unwrap(), book);
    let empty = Book::default().text(usize::MAX).unwrap();
    assert_eq!(Book::read(&empty).unwrap(), Book::default());

    for (odd, why) in [
        (String::new(), "it is not what migvisor writes"),
        ("{}".to_owned(), "missing field `format`"),
        (text.replace("\"format\":1", "\"format\":2"), "its format is 2"),
        (text.replace("dryRun", "wetRun"), "it is not what migvisor writes"),
        (text.replace("node-b", ""), "a node's name of 0 bytes"),
        (text.replace(&(100 * MIB).to_string(), "7"), "a line that carries 7 B/s"),
        (text.replace("0.4055", "1e9"), "off by e^1000000000"),
        (text.replace("\"pages\":[]", "\"pages\":[null]"), "invalid type: null"),
        (text.replace("\"taught\":[]", "\"taught\":[\"\"]"), "a migration's UID of 0 bytes"),
        (text.chars().take(40).collect(), "EOF"),
    ] {
        let error = Book::read(&odd).unwrap_err().to_string();
        assert!(error.contains(why), "{odd}: {error}");
    }
}

#[test]
fn what_does_not_fit_is_what_was_used_least_recently() {
    let mut book = Book::default();
    for node in 0..100_u64 {
        for _ in 0..WINDOW {
            book.learn(&rate(&format!("from-{node:03}"), "to", NOW - node, 100));
        }
    }
    book.settle(NOW);
    let whole = book.text(usize::MAX).unwrap().len();
    let text = book.text(whole / 2).unwrap();
    assert!(text.len() <= whole / 2 && book.pairs() >= 40, "{} bytes, {} pairs", text.len(), book.pairs());
    let left = u64::try_from(book.pairs()).unwrap();
    for node in 0..100 {
        let known = in_mib(&book, &format!("from-{node:03}")).is_some();
        assert_eq!(known, node < left, "of {left} the younger ones stay: {node}");
    }
    assert_eq!(Book::read(&text).unwrap(), book);
    assert_eq!(book.text(10), None, "nothing fits there");
}

proptest! {
    /// Fewer than half of the observations never decide, however odd they are.
    #[test]
    fn outliers_stay_within_the_honest(
        honest in prop::collection::vec(50_u64..200, 5), odd in prop::collection::vec(1_u64..1_000_000, 0..5)
    ) {
        let all: Vec<u64> = honest.iter().chain(&odd).copied().collect();
        let (low, high) = (*honest.iter().min().unwrap(), *honest.iter().max().unwrap());
        let rate = learned(&all).unwrap();
        prop_assert!((low..=high).contains(&rate), "{rate} of {honest:?} and {odd:?}");
    }

    #[test]
    fn no_text_panics(text in ".{0,80}") {
        prop_assert!(Book::read(&text).is_err());
    }

    #[test]
    fn no_lessons_break_a_book(
        lessons in prop::collection::vec((any::<u64>(), any::<u64>(), any::<f64>(), any::<f64>()), 0..40)
    ) {
        let mut book = Book::default();
        for (at, bytes, real, forecast) in lessons {
            let sent = Transfer { wire: Bytes(bytes), total: Duration::from_millis(at % 100_000), ..transfer() };
            if let Some(rate) = sent.line_rate() {
                book.learn(&Lesson::Rate { from: "a".into(), to: "b".into(), at, rate });
            }
            if let Some(lesson) = Lesson::error(Method::DryRun, Figure::Pages, real, forecast) {
                book.learn(&lesson);
            }
            book.settle(at);
        }
        let text = book.text(usize::MAX).unwrap();
        prop_assert_eq!(Book::read(&text).unwrap(), book);
    }
}

#[test]
fn a_hand_over_takes_what_was_seen_beyond_the_last_pages() {
    let of = |real, forecast, assumed| Lesson::switchover(real, forecast, assumed);
    assert_eq!(of(45.0, 11.0, 5.0), Some(Lesson::Switchover { ms: 39.0 }));
    assert_eq!(of(4.0, 11.0, 5.0), Some(Lesson::Switchover { ms: 0.0 }), "the last pages were fewer");
    assert_eq!(of(6000.0, 11.0, 5.0), None, "it waited for something");
    assert_eq!(of(f64::NAN, 11.0, 5.0), None);

    let mut book = Book::default();
    let mut learn = |all: &[f64]| {
        for ms in all {
            book.learn(&Lesson::Switchover { ms: *ms });
        }
        book.settle(NOW);
        book.switchover()
    };
    assert_eq!(learn(&[39.0; ENOUGH - 1]), None);
    assert_eq!(learn(&[39.4]), Some(39.0));
    assert_eq!(learn(&[900.0; ENOUGH - 1]), Some(39.0), "four odd ones in nine");
    assert_eq!(learn(&[42.0; SWITCHOVERS]), Some(39.0), "not worth asking everybody anew");
    assert_eq!(learn(&[50.0; SWITCHOVERS]), Some(50.0));
    let text = book.text(1000).unwrap();
    assert_eq!(Book::read(&text).unwrap(), book, "over a restart");
    for absurd in [text.replace("50.0", "-1.0"), text.replace("50.0", "5001.0")] {
        assert!(matches!(Book::read(&absurd), Err(BookError::Absurd(_))), "{absurd}");
    }
}
