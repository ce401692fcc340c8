"""What `python -m bench.sass` reads in a kernel's instructions."""

from bench.sass import Stretch, parsed, stretches

LOOP = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 BRA `(.L_x_2) ;
        /*0030*/                   {between}
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
.L_x_2:
        /*0050*/                   LDG.E R3, desc[UR4][R2.64+0x20] ;
        /*0060*/                   FADD R12, R7, R9 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""
STRAIGHT = """
        /*0000*/                   CALL.REL.NOINC `($__division) ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
        /*0020*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0030*/                   EXIT ;
.L_x_3:
        /*0040*/                   EXIT ;
.L_x_4:
        /*0050*/                   BRA `(.L_x_4);
$__division:
        /*0060*/                   MUFU.RCP R4, R4 ;
        /*0070*/                   RET.REL.NODEC R2 `(kernel) ;
"""


def test_the_way_through_a_loop_that_reads_most() -> None:
    for between, at_once in (("NOP ;", 2), ("FADD R1, R6, R6 ;", 1)):
        assert stretches(parsed(LOOP.replace("{between}", between))) == [Stretch(7, 2, 0, 1, at_once)]


def test_the_way_through_a_kernel_without_a_loop_and_its_subroutine() -> None:
    code = parsed(STRAIGHT)
    assert [one.name for one in code][:2] == ["CALL.REL.NOINC", "BRA"]
    assert stretches(code) == [Stretch(6, 0, 1, 0, 0)]
