//! The parser on QEMU 10.0.2's own words, and the selection on machines of several backends. A real QEMU: e2e.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

const LISTING: &str =
    "              Block Name    PSize              Offset               Used              Total                HVA  RO\r
                      m0    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f109be00000  rw\r
                      m1    2 MiB  0x0000000010000000 0x0000000010000000 0x0000000010000000 0x00007f108bc00000  rw\r
   0000:00:02.0/vga.vram    4 KiB  0x0000000020080000 0x0000000001000000 0x0000000001000000 0x00007f1089800000  rw\r
    0000:00:03.0/vmem0    4 KiB  0x0000000030080000 0x0000000010000000 0x0000000010000000 0x00007f1059800000  rw\r
    /rom@etc/acpi/tables    4 KiB  0x00000000210c0000 0x0000000000020000 0x0000000000200000 0x00007f1089400000  ro\r
                 pc.bios    4 KiB  0x0000000020000000 0x0000000000040000 0x0000000000040000 0x00007f10b0400000  ro\r
";

const QUARTER: u64 = 256 << 20;

fn backends(ids: &[&str]) -> Vec<Backend> {
    ids.iter().map(|id| Backend { id: Some((*id).to_owned()), size: QUARTER }).collect()
}

fn virtio_mem() -> Vec<Device> {
    vec![Device { kind: "virtio-mem".to_owned(), data: DeviceData { memdev: "/objects/vmem0".to_owned() } }]
}

fn chosen(base: u64, plugged: u64, ids: &[&str], devices: &[Device]) -> Result<Vec<String>, String> {
    let summary = Summary { base_memory: base, plugged_memory: plugged };
    select(parse_info_ramblock(LISTING).unwrap(), &summary, &backends(ids), devices)
        .map(|ram| ram.blocks.into_iter().map(|block| block.name).collect())
}

#[test]
fn reads_qemus_own_words() {
    let blocks = parse_info_ramblock(LISTING).unwrap();
    assert_eq!(blocks.len(), 6);
    let second = RamBlock {
        name: "m1".to_owned(),
        page_size: Bytes(2 << 20),
        used: Bytes(QUARTER),
        total: Bytes(QUARTER),
        host_address: 0x7f10_8bc0_0000,
        read_only: false,
    };
    assert_eq!(blocks.get(1), Some(&second));
    assert!(blocks.iter().any(|block| block.read_only && block.used != block.total));
}

#[test]
fn takes_the_backends_and_nothing_else() {
    assert_eq!(chosen(2 * QUARTER, 0, &["m0", "m1"], &[]).unwrap(), ["m0", "m1"]);
    assert_eq!(chosen(2 * QUARTER, 64 << 20, &["vmem0", "m1", "m0"], &virtio_mem()).unwrap(), ["m0", "m1", "0000:00:03.0/vmem0"]);
}

#[test]
fn does_not_guess() {
    for (base, plugged, ids, devices) in [
        (3 * QUARTER, 0, vec!["m0", "m1"], vec![]),
        (QUARTER, 0, vec!["m0", "m1"], vec![]),
        (2 * QUARTER, 0, vec![], vec![]),
        (2 * QUARTER, 512 << 20, vec!["m0", "m1", "vmem0"], virtio_mem()),
        (
            2 * QUARTER,
            0,
            vec!["m0", "m1"],
            vec![Device { kind: "nvdimm".to_owned(), data: DeviceData { memdev: String::new() } }],
        ),
    ] {
        assert!(chosen(base, plugged, &ids, &devices).is_err(), "{base} {plugged} {ids:?}");
    }
    let wrong_size = [Backend { id: Some("m0".to_owned()), size: 1 << 20 }];
    let summary = Summary { base_memory: 1 << 20, plugged_memory: 0 };
    assert!(select(parse_info_ramblock(LISTING).unwrap(), &summary, &wrong_size, &[]).is_err());
}

#[test]
fn refuses_what_it_does_not_know() {
    for text in ["", "unknown command: 'info ramblock'\r\n", "Block Name PSize Offset Used Total HVA\n x 4 KiB 0x0 0x2 0x1 0x1\n"]
    {
        assert!(parse_info_ramblock(text).is_err(), "{text}");
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in any::<String>()) {
        let _ = parse_info_ramblock(&text);
        let _ = parse_info_ramblock(&format!("Block Name HVA\n{text}"));
        let _ = parse_block(&text);
    }

    #[test]
    fn what_is_written_is_read(name in "[a-z0-9:./@-]{1,20}( [a-z]{1,5})?", used in 0_u64..1 << 40, spare in 0_u64..1 << 20, at in any::<u64>(), read_only: bool) {
        let flag = if read_only { "ro" } else { "rw" };
        let total = used + spare;
        let line = format!("{name:>24}  4 KiB  0x{:018x} 0x{used:016x} 0x{total:016x} 0x{at:016x}  {flag}", 0);
        let block = RamBlock { name, page_size: Bytes(4096), used: Bytes(used), total: Bytes(total), host_address: at, read_only };
        prop_assert_eq!(parse_block(&line), Some(block));
    }
}
