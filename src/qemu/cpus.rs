//! How busy a guest's CPUs are, as the kernel's scheduler counts it.
//!
//! In: QEMU's process, at two moments. Out: for each virtual CPU the share of the time that it ran, or waited for a CPU of the host. What
//! auto-converge takes away is time that an idle guest did not need.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// More threads than this no QEMU has.
const MOST: usize = 10_000;

/// What the threads of a guest's CPUs have used until a moment.
#[derive(Debug, Clone)]
pub struct CpuTimes {
    at: Instant,
    wanted: BTreeMap<u32, Duration>,
}

impl CpuTimes {
    /// Of the threads that QEMU calls `CPU 0/KVM` and so on, which it does under libvirt (`debug-threads=on`). Empty where it does not, or
    /// where the process may not be looked into.
    pub fn read(pid: i32) -> Self {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().take(MOST);
        let wanted = tasks.filter_map(|task| {
            let (id, path) = (task.file_name().to_str()?.parse().ok()?, task.path());
            let is_cpu = fs::read_to_string(path.join("comm")).ok()?.starts_with("CPU ");
            Some((id, is_cpu.then(|| wanted(&path))??))
        });
        Self { at: Instant::now(), wanted: wanted.collect() }
    }

    /// The share of the time since `before`, 0..=1, of each CPU that was there all the while.
    pub fn busy_since(&self, before: &Self) -> Vec<f64> {
        let passed = self.at.saturating_duration_since(before.at).as_secs_f64();
        let share = |(id, now): (&u32, &Duration)| {
            let used = now.saturating_sub(*before.wanted.get(id)?).as_secs_f64();
            Some((used / passed).min(1.0)).filter(|share| share.is_finite())
        };
        self.wanted.iter().filter_map(share).collect()
    }
}

/// Time on a CPU and time waiting for one, of a thread (`schedstat`: nanoseconds, and how often).
fn wanted(task: &Path) -> Option<Duration> {
    let text = fs::read_to_string(task.join("schedstat")).ok()?;
    let mut numbers = text.split_whitespace().map(str::parse::<u64>);
    let (ran, waited) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some(Duration::from_nanos(ran.saturating_add(waited)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_thread_that_works_is_busy_and_one_that_sleeps_is_not() {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let named =
            |name: &str, work: Box<dyn FnOnce() + Send>| std::thread::Builder::new().name(name.into()).spawn(work).unwrap();
        let until = Instant::now() + Duration::from_millis(600);
        let works = named("CPU 0/KVM", Box::new(move || while Instant::now() < until {}));
        let sleeps = named("CPU 1/KVM", Box::new(move || stopped.recv().unwrap_or_default()));
        let other = named("worker", Box::new(move || while Instant::now() < until {}));
        std::thread::sleep(Duration::from_millis(50));
        let me = i32::try_from(std::process::id()).unwrap();
        let before = CpuTimes::read(me);
        std::thread::sleep(Duration::from_millis(400));
        let mut busy = CpuTimes::read(me).busy_since(&before);
        drop(stop);
        works.join().and_then(|()| sleeps.join()).and_then(|()| other.join()).unwrap();
        busy.sort_by(f64::total_cmp);
        assert_eq!(busy.len(), 2, "{busy:?}");
        assert!(busy[0] < 0.1 && busy[1] > 0.9, "{busy:?}");
    }

    #[test]
    fn a_process_that_is_not_there_has_none() {
        let none = CpuTimes::read(-1);
        assert!(none.busy_since(&none).is_empty());
    }
}
