//! seccomp filters from tables of system calls.

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use libc::{c_int, c_long};
use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::Support;

/// Flags of `clone` for a thread instead of a process.
pub const THREAD: c_int = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD;

/// Condition for memory that is not executable: argument 2 of `mmap` and `mprotect`.
pub const NOT_EXECUTABLE: Test = Test::Bits {
    mask: libc::PROT_EXEC,
    set: 0,
};

/// Condition for an argument.
#[derive(Clone, Copy, Debug)]
pub enum Test {
    /// The argument has this value.
    Is(c_int),
    /// Of the bits in `mask`, exactly those in `set` are set.
    Bits {
        /// Bits that are compared.
        mask: c_int,
        /// Their values.
        set: c_int,
    },
    /// The argument is a null pointer.
    Null,
}

/// A system call that is allowed if a condition holds for an argument, counted from 0. Several conditions of
/// one call are alternatives.
pub type Conditional = (c_long, u8, Test);

/// The system calls of a process.
#[derive(Clone, Debug)]
pub struct Calls {
    /// Allowed calls.
    pub allowed: Vec<c_long>,
    /// Calls that are allowed with conditions.
    pub conditional: Vec<Conditional>,
    /// Calls that libraries can do without: they fail with ENOSYS, unless they are allowed.
    pub absent: &'static [c_long],
    /// Effect of all other calls.
    pub forbidden: SeccompAction,
}

impl Test {
    fn rule(self, argument: u8) -> Result<SeccompRule, BackendError> {
        use SeccompCmpArgLen::{Dword, Qword};
        // The kernel uses only the low half of a register for an `int`.
        let bits = |bits: c_int| u64::from(bits.cast_unsigned());
        let (width, test, value) = match self {
            Test::Is(value) => (Dword, SeccompCmpOp::Eq, bits(value)),
            Test::Bits { mask, set } => (Dword, SeccompCmpOp::MaskedEq(bits(mask)), bits(set)),
            Test::Null => (Qword, SeccompCmpOp::Eq, 0),
        };
        SeccompRule::new(vec![SeccompCondition::new(argument, width, test, value)?])
    }
}

impl Calls {
    /// Compiles the filters, to be installed in this order. `None` if there are none for this processor.
    ///
    /// Of two filters, the kernel obeys the one with the stricter answer, and of two errors that of the
    /// filter that was installed last.
    ///
    /// # Errors
    /// A filter does not compile.
    pub fn filters(self) -> Result<Option<[BpfProgram; 2]>, BackendError> {
        let Ok(arch) = TargetArch::try_from(ARCH) else {
            return Ok(None);
        };
        let always = |call: &c_long| (*call, Vec::new());
        let absent = self.absent.iter();
        let absent = absent.filter(|call| !self.allowed.contains(call));
        let absent: BTreeMap<_, _> = absent.map(always).collect();
        let known = self.allowed.iter().chain(self.absent);
        let mut known: BTreeMap<_, _> = known.map(always).collect();
        for (call, argument, test) in self.conditional {
            known.entry(call).or_default().push(test.rule(argument)?);
        }
        let allow = SeccompAction::Allow;
        let no_such_call = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
        let absent = SeccompFilter::new(absent, allow.clone(), no_such_call, arch)?;
        let known = SeccompFilter::new(known, self.forbidden, allow, arch)?;
        Ok(Some([absent.try_into()?, known.try_into()?]))
    }
}

/// Installs filters for all threads.
///
/// # Errors
/// The kernel has seccomp and refuses a filter.
pub fn install(filters: &[BpfProgram]) -> Result<Support, Error> {
    for program in filters {
        match seccompiler::apply_filter_all_threads(program) {
            Ok(()) => {}
            Err(Error::Seccomp(error))
                if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) =>
            {
                return Ok(Support::Missing);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Support::Full)
}
