//! Compiles tables of system calls into a program of the kernel's packet filter (BPF).
//!
//! The kernel translates and compiles the program at every start of a process, which takes about a microsecond for each
//! instruction. So a program has one instruction for a call that is always allowed:
//!
//! ```text
//! architecture -> number -> a call with conditions: its tests, then allowed or forbidden
//!                        -> an allowed call: allowed
//!                        -> a call that libraries can do without: ENOSYS
//!                        -> forbidden
//! ```

use std::collections::BTreeMap;

use libc::{c_int, c_long};
use seccompiler::{BpfProgram, SeccompAction, sock_filter};

use super::seccomp::{Calls, Test};

/// `AUDIT_ARCH_*` of this processor.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: Option<u32> = Some(0xc000_003e);
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: Option<u32> = Some(0xc000_00b7);
#[cfg(target_arch = "riscv64")]
const ARCHITECTURE: Option<u32> = Some(0xc000_00f3);
#[cfg(not(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "riscv64"
)))]
const ARCHITECTURE: Option<u32> = None;

// Offsets in `struct seccomp_data`. All processors above are little-endian.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

/// Most calls that share the instruction that decides about them: a jump skips at most 255.
const GROUP: usize = 200;

/// Compiles the filter. `None` if there is none for this processor.
pub fn compile(calls: &Calls) -> Option<BpfProgram> {
    let architecture = ARCHITECTURE?;
    let forbidden = u32::from(calls.forbidden.clone());
    let mut conditions = BTreeMap::<c_long, Vec<(u8, Test)>>::new();
    for (call, argument, test) in &calls.conditional {
        conditions
            .entry(*call)
            .or_default()
            .push((*argument, *test));
    }
    let mut program = vec![
        load(ARCH),
        jump_if(architecture, 1, 0),
        answer(u32::from(SeccompAction::KillProcess)),
        load(NUMBER),
    ];
    for (call, tests) in &conditions {
        let tests = alternatives(tests, forbidden);
        // Every call has few conditions.
        let skipped = u8::try_from(tests.len()).ok()?;
        program.push(jump_if(number(*call), 0, skipped));
        program.extend(tests);
    }
    let is_free = |call: &&c_long| !conditions.contains_key(*call);
    let allowed: Vec<_> = calls.allowed.iter().filter(is_free).copied().collect();
    program.extend(decide(&allowed, u32::from(SeccompAction::Allow)));
    // A call that is allowed too was decided above.
    let absent = u32::from(SeccompAction::Errno(libc::ENOSYS.unsigned_abs()));
    program.extend(decide(calls.absent, absent));
    program.push(answer(forbidden));
    Some(program)
}

/// Answers each of `calls` with `action`.
fn decide(calls: &[c_long], action: u32) -> Vec<sock_filter> {
    let mut program = Vec::new();
    for group in calls.chunks(GROUP) {
        for (left, call) in (1..=group.len()).rev().zip(group) {
            let to_answer = u8::try_from(left).unwrap_or(u8::MAX);
            program.push(jump_if(number(*call), to_answer, 0));
        }
        program.push(jump(1));
        program.push(answer(action));
    }
    program
}

/// Allows a call if one of `tests` holds.
fn alternatives(tests: &[(u8, Test)], forbidden: u32) -> Vec<sock_filter> {
    let mut program = Vec::new();
    for (argument, test) in tests {
        let low = ARGUMENTS + 8 * u32::from(*argument);
        program.push(load(low));
        match test {
            Test::Is(value) => program.push(jump_if(bits(*value), 0, 1)),
            Test::Bits { mask, set } => {
                program.extend([mask_with(bits(*mask)), jump_if(bits(*set), 0, 1)]);
            }
            Test::Null => program.extend([jump_if(0, 0, 3), load(low + 4), jump_if(0, 0, 1)]),
        }
        program.push(answer(u32::from(SeccompAction::Allow)));
    }
    program.push(answer(forbidden));
    program
}

/// The kernel uses only the low half of a register for an `int`.
fn bits(value: c_int) -> u32 {
    value.cast_unsigned()
}

/// Numbers of calls are small and positive. Another one matches no call.
fn number(call: c_long) -> u32 {
    u32::try_from(call).unwrap_or(u32::MAX)
}

/// Loads a word of `struct seccomp_data`.
fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

fn mask_with(mask: u32) -> sock_filter {
    instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, mask)
}

/// Skips instructions: `yes` if the loaded word is `value`, and `no` otherwise.
fn jump_if(value: u32, yes: u8, no: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, yes, no, value)
}

/// Skips instructions.
fn jump(skipped: u32) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, skipped)
}

fn answer(action: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, action)
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    // The codes have seven bits.
    let code = u16::try_from(code).unwrap_or_default();
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::confine::seccomp::NOT_EXECUTABLE;

    /// A system call.
    struct Call {
        arch: u32,
        number: u32,
        arguments: [u64; 6],
    }

    impl Call {
        fn word(&self, offset: u32) -> u32 {
            match offset {
                NUMBER => self.number,
                ARCH => self.arch,
                offset => {
                    let at = offset - ARGUMENTS;
                    let argument = self.arguments[at as usize / 8];
                    (argument >> (at % 8 * 8)) as u32
                }
            }
        }
    }

    /// What the kernel does with `program`.
    fn execute(program: &[sock_filter], call: &Call) -> u32 {
        let (mut at, mut word) = (0, 0);
        loop {
            let instruction = &program[at];
            let k = instruction.k;
            at += 1;
            match u32::from(instruction.code) {
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => word = call.word(k),
                code if code == libc::BPF_ALU | libc::BPF_AND | libc::BPF_K => word &= k,
                code if code == libc::BPF_JMP | libc::BPF_JA => at += k as usize,
                code if code == libc::BPF_RET | libc::BPF_K => return k,
                code if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => {
                    at += usize::from(match word == k {
                        true => instruction.jt,
                        false => instruction.jf,
                    });
                }
                code => panic!("unknown instruction {code:#x}"),
            }
        }
    }

    fn calls(count: c_long) -> Calls {
        Calls {
            // Also two that have conditions, and are not allowed without them.
            allowed: (0..count).collect(),
            conditional: vec![
                (3, 1, Test::Is(-5)),
                (3, 2, Test::Is(7)),
                (4, 0, NOT_EXECUTABLE),
                (count + 5, 4, Test::Null),
            ],
            absent: &[1, 700, 701],
            forbidden: SeccompAction::Trap,
        }
    }

    #[test]
    fn every_call_is_decided_as_the_tables_say() {
        let [allow, trap] = [SeccompAction::Allow, SeccompAction::Trap].map(u32::from);
        let absent = u32::from(SeccompAction::Errno(libc::ENOSYS as u32));
        for count in [5, 198, 199, 200, 201, 399, 400, 401, 600] {
            let program = compile(&calls(count)).unwrap();
            assert!(
                (program.len() as c_long) < count + 40,
                "{} instructions",
                program.len()
            );
            let decide = |number: c_long, arguments| {
                let (arch, number) = (ARCHITECTURE.unwrap(), number as u32);
                execute(
                    &program,
                    &Call {
                        arch,
                        number,
                        arguments,
                    },
                )
            };
            for number in (0..count).filter(|number| ![3, 4].contains(number)) {
                assert_eq!(decide(number, [0; 6]), allow, "{number} of {count}");
            }
            for number in [count, count + 1, 699, 702, c_long::from(u32::MAX)] {
                assert_eq!(decide(number, [0; 6]), trap, "{number} of {count}");
            }
            for number in [700, 701] {
                assert_eq!(decide(number, [0; 6]), absent, "{number} of {count}");
            }
            let is = u64::from((-5i32).cast_unsigned());
            // The high half of an `int` is not used.
            for arguments in [
                [0, is, 0, 0, 0, 0],
                [0, is | 1 << 40, 0, 0, 0, 0],
                [0, 0, 7, 0, 0, 0],
            ] {
                assert_eq!(decide(3, arguments), allow);
            }
            assert_eq!(decide(3, [is, 7, is, 0, 0, 0]), trap);
            let executable = libc::PROT_EXEC as u64;
            assert_eq!(decide(4, [3, executable, executable, 0, 0, 0]), allow);
            assert_eq!(decide(4, [executable, 0, 0, 0, 0, 0]), trap);
            let conditional = count + 5;
            assert_eq!(decide(conditional, [9, 9, 9, 9, 0, 9]), allow);
            for pointer in [1, 1 << 32, u64::MAX] {
                assert_eq!(decide(conditional, [0, 0, 0, 0, pointer, 0]), trap);
            }
        }
    }

    #[test]
    fn a_call_of_another_architecture_ends_the_process() {
        let program = compile(&calls(10)).unwrap();
        let arch = ARCHITECTURE.unwrap() ^ 1;
        let call = Call {
            arch,
            number: 0,
            arguments: [0; 6],
        };
        assert_eq!(
            execute(&program, &call),
            u32::from(SeccompAction::KillProcess)
        );
    }
}
