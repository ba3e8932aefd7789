//! Cgroups as kubelets and others name them, and a `/proc` of our own making. Real cgroups: e2e.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;

const A: &str = "0f6c3f0e-0a3b-4b62-9c5e-6f6b3a1b2c3d";
const B: &str = "11111111-2222-3333-4444-555555555555";

fn pod(uid: &str) -> PodUid {
    uid.parse().unwrap()
}

#[test]
fn only_a_uuid_is_a_pods_uid() {
    for text in
        ["", "..", "../x", "/", A[1..].into(), &A.to_uppercase(), &format!("{A}\n"), "0f6c3f0e_0a3b_4b62_9c5e_6f6b3a1b2c3d"]
    {
        assert_eq!(text.parse::<PodUid>(), Err(NotAPodUid), "{text:?}");
    }
}

#[test]
fn both_drivers_and_both_versions_are_read() {
    let u = A.replace('-', "_");
    for text in [
        format!("0::/kubepods/burstable/pod{A}/8c2d\n"),
        format!("0::/kubepods/pod{A}/8c2d"),
        format!("0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{u}.slice/cri-containerd-8c2d.scope\n"),
        format!("0::/kubepods.slice/kubepods-pod{u}.slice/crio-8c2d.scope/libvirt/emulator"),
        format!("0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort-pod{u}.slice/x"),
        format!("0::/../../kubepods-besteffort-pod{u}.slice/x"),
        format!("9:name=systemd:/kubepods/pod{A}/x\n4:memory:/kubepods/pod{A}/x\n1:cpu,cpuacct:/kubepods/pod{A}\n0::/\n"),
    ] {
        assert_eq!(pod_of(&text), Some(pod(A)), "{text}");
    }
    for text in
        ["", "0::/", "garbage", "0::/machine.slice/libpod-8c2d.scope", "0::/podruntime.slice/kubelet", "0::/kubepods/podx"]
    {
        assert_eq!(pod_of(text), None, "{text}");
    }
}

#[test]
fn who_names_cgroups_below_its_own_stays_who_it_is() {
    assert_eq!(pod_of(&format!("0::/kubepods/pod{B}/8c2d/pod{A}")), Some(pod(B)));
    assert_eq!(pod_of(&format!("0::/kubepods/pod{B}/x/kubepods-pod{}.slice", A.replace('-', "_"))), Some(pod(B)));
    // Two hierarchies that contradict each other.
    assert_eq!(pod_of(&format!("4:memory:/kubepods/pod{A}\n8:pids:/kubepods/pod{B}\n")), None);
}

/// A `/proc` with one process: its program, its cgroup, its arguments.
fn process(proc: &Path, pid: i32, program: &str, uid: &str, arguments: &str) {
    let dir = proc.join(pid.to_string());
    fs::create_dir(&dir).unwrap();
    symlink(format!("/usr/bin/{program}"), dir.join("exe")).unwrap();
    fs::write(dir.join("cgroup"), format!("0::/kubepods/burstable/pod{uid}/8c2d\n")).unwrap();
    fs::write(dir.join("cmdline"), arguments).unwrap();
}

#[test]
fn a_pods_qemu_is_the_one_in_its_cgroup_whatever_it_calls_itself() {
    let proc = tempfile::tempdir().unwrap();
    let here = Processes::new(proc.path());
    process(proc.path(), 10, "virtqemud", A, "");
    process(proc.path(), 11, "qemu-kvm", B, &format!("qemu-kvm\0-name\0guest={A}\0-uuid\0{A}\0"));
    assert!(matches!(here.qemu_of(&pod(A)), Err(ProcessError::None { .. })));
    process(proc.path(), 12, "qemu-system-x86_64 (deleted)", A, &format!("qemu-kvm\0-uuid\0{B}\0"));
    assert_eq!(here.qemu_of(&pod(A)).unwrap(), 12);
    assert_eq!(here.qemu_with_uuid(A), Some(11));
    here.ensure_of(10, &pod(A)).unwrap();
    let foreign = here.ensure_of(11, &pod(A)).unwrap_err().to_string();
    assert!(foreign.contains(A) && foreign.contains(B) && foreign.contains("not believed"), "{foreign}");
    assert!(here.ensure_of(99, &pod(A)).is_err(), "gone");

    process(proc.path(), 13, "qemu-kvm", A, &format!("qemu-kvm\0-uuid\0{A}\0"));
    let several = here.qemu_of(&pod(A)).unwrap_err().to_string();
    assert!(several.contains("12") && several.contains("13"), "{several}");
    assert_eq!(here.qemu_with_uuid(A), None, "two claim it");
    assert!(Processes::new(proc.path().join("none")).qemu_of(&pod(A)).unwrap_err().to_string().contains("hostPID"));
}

proptest! {
    #[test]
    fn no_cgroup_makes_the_parser_panic(text in any::<String>(), uid in "[0-9a-f-]{30,40}") {
        let _ = pod_of(&text);
        let _ = pod_of(&format!("0::/{text}-pod{uid}.slice/pod{uid}"));
    }
}
