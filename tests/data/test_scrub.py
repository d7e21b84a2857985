from __future__ import annotations

import pytest
from faker import Faker

from ultra.data.instructions import CUE, questions
from ultra.data.scrub import holds_identity, scrub
from ultra.data.synthetic import SITES, _possible_truths, write_report


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("姓名：张建国 性别：男", "姓名：[姓名] 性别：男"),
        ("姓 名: 张 三", "姓 名: [姓名]"),
        ("姓名张建国性别男年龄52岁", "姓名[姓名]性别男年龄52岁"),
        ("患者张建国，男，52岁，右上腹痛。", "患者[姓名]，男，52岁，右上腹痛。"),
        ("病人：李娜，女", "病人：[姓名]，女"),
        ("患者李明既往体健", "患者[姓名]既往体健"),
        ("欧阳修远 男 45岁", "[姓名] 男 45岁"),
        ("姓名：买买提·吐尔逊", "姓名：[姓名]"),
        ("姓名：张某某", "姓名：[姓名]"),
        ("姓名：王**", "姓名：[姓名]"),
        ("姓名：ＺＨＡＮＧ ＳＡＮ", "姓名：[姓名]"),
        ("Name: ZHANG^SAN", "Name: [姓名]"),
        ("Patient: John Smith", "Patient: [姓名]"),
        ("Signed by Mary O'Brien", "Signed by [姓名]"),
        ("送检医生：王芳", "送检医生：[姓名]"),
        ("报告医师 李四  审核医师 王小明", "报告医师 [姓名]  审核医师 [姓名]"),
        ("检查医师：于洋，记录者：刘洋", "检查医师：[姓名]，记录者：[姓名]"),
        ("肝囊肿。医师：赵六", "肝囊肿。医师：[姓名]"),
        ("肝囊肿。\n签名：陈静", "肝囊肿。\n签名：[姓名]"),
        ("肝囊肿。 张建国 2024年3月17日", "肝囊肿。 [姓名] [日期]"),
        ("肝囊肿。\n张建国/李四", "肝囊肿。\n[姓名]/[姓名]"),
        ("请张建国主任会诊", "请[姓名]主任会诊"),
        ("住院号：0012345 床号：12", "住院号：[编号] 床号：[编号]"),
        ("门诊号MZ-202403", "门诊号[编号]"),
        ("检查号 US20240317001", "检查号 [编号]"),
        ("病历号:A00123，超声号：１２３４５６", "病历号:[编号]，超声号：[编号]"),
        ("ID:20240317065", "ID:[编号]"),
        ("3病区12床，床旁超声", "3病区[编号]，床旁超声"),
        ("手机13812345678", "手机[电话]"),
        ("电话：(010)62345678，010-62345678", "电话：[电话]，[电话]"),
        ("联系方式 +86 138 1234 5678", "联系方式 [电话]"),
        ("身份证号11010119900307771X", "身份证号[证件号]"),
        ("110101900307771", "[证件号]"),
        ("护照：E12345678", "护照：[证件号]"),
        ("检查日期：2024-03-17 10:15:30", "检查日期：[日期]"),
        ("2024年3月17日上午10时", "[日期]上午10时"),
        ("2024/3/17，2024.03.17，20240317", "[日期]，[日期]，[日期]"),
        ("二〇二四年三月十七日", "[日期]"),
        ("末次月经3月17日", "末次月经[日期]"),
        ("24-MAY-02, Mar 17, 2024", "[日期], [日期]"),
        ("17/03/2024 与 2024年3月", "[日期] 与 [日期]"),
        ("患者于北京协和医院行手术", "患者于[医院]行手术"),
        ("我院与上海市第六人民医院对照", "我院与[医院]对照"),
        ("zhang.san@example.org", "[邮箱]"),
        ("家庭住址：北京市海淀区学院路1号", "家庭住址：[地址]"),
        ("1.2.840.113619.2.5.1762583153", "[编号]"),
    ],
)
def test_identities_become_placeholders(text: str, scrubbed: str) -> None:
    found = scrub(text)
    assert found.text == scrubbed
    kinds = [part.split("]")[0] for part in scrubbed.split("[")[1:]]
    assert found.counts == {kind: kinds.count(kind) for kind in kinds}
    assert scrub(scrubbed).text == scrubbed


REPORTS = (
    "肝脏大小形态正常，包膜光整，实质回声均匀，右叶见一无回声区，大小约12mm×10mm，边界清晰，后方回声增强。",
    "胆囊大小约6.5×2.3cm，壁厚0.3cm，腔内见多个强回声团，较大者约0.8cm，后方伴声影，随体位移动。",
    "宫内妊娠，单活胎，头位，孕12周+3天，双顶径2.1cm，股骨长0.9cm，胎心率152次/分，羊水指数12.5cm。",
    "左侧乳腺外上象限2点钟方向距乳头3cm处见低回声结节，大小_2DS_，边界欠清，BI-RADS 4a类。",
    "甲状腺右叶下极结节，大小约_SMM_×_SMM_，纵横比>1，TI-RADS 3类，建议3～6个月复查。",
    "右肾下极见1.2cm×1.1cm×0.9cm囊肿，PSV 0.8cm/s，RI 0.65，EF 62%，LVIDd 45mm，心率75bpm。",
    "患者自述右上腹痛3天，既往高血压、糖尿病史10年，2019年行胆囊切除术。",
    "患者高血压，女，黄疸待查；患者配合欠佳，显示不清。患者孕期平稳。患者左侧卧位检查。",
    "请临床医师结合病史及实验室检查，建议上级医院进一步检查，必要时专科医院就诊。",
    "主任医师查房后建议住院医师随访；当地医院超声提示肝血管瘤。",
    "10点钟方向、3:00方向各见一结节，大小分别为5/6/7mm、12-13-14mm，2次测量平均值 3.14mm。",
    "前列腺大小约4.2×3.1×2.9cm，体积18.5ml，移行区见钙化斑，残余尿量约20ml。",
    "颈动脉内中膜厚度0.9mm，分叉处见等回声斑块，大小约8.1×2.0mm，管腔狭窄率约30%。",
    "胎儿NT 1.2mm，静脉导管a波正向，胎盘位于前壁，成熟度0级，脐带绕颈一周。",
    "子宫前位，内膜厚8mm，肌层回声不均，于后壁见低回声团，考虑子宫肌瘤；双侧附件区未见明显异常。",
    "Liver: right lobe cyst 1.2 x 1.0 cm, well defined. Gallbladder normal. No hydronephrosis.",
    "方案同前。黄体囊肿可能。白膜完整。高回声结节。金属节育器位置正常。全层增厚。石样强回声。",
)


@pytest.mark.parametrize("report", REPORTS)
def test_medicine_stays_as_it_is(report: str) -> None:
    assert scrub(report).text == report
    assert scrub(report).counts == {}


def test_what_the_simulator_writes_stays_as_it_is() -> None:
    texts = [text for truth in _possible_truths() for text in write_report(truth)]
    texts += [question for ways in questions().values() for question in ways]
    texts += [complaint for site in SITES.values() for complaint in site.complaints]
    texts += [CUE, *SITES]
    assert len(texts) > 100
    assert [text for text in texts if scrub(text).counts] == []


def test_nothing_of_an_invented_letterhead_is_left() -> None:
    fake = Faker("zh_CN")
    fake.seed_instance(7)
    for _ in range(300):
        name, phone, card = fake.name(), fake.phone_number(), fake.ssn()
        date = fake.date(pattern="%Y年%m月%d日")
        text = (
            f"姓名：{name} 性别：女 电话：{phone} 身份证：{card}\n"
            f"所见：肝右叶见一囊肿，大小约12mm。\n报告医师：{name}  审核医师 {name} {date}"
        )
        cleaned = scrub(text).text
        assert phone not in cleaned
        assert card not in cleaned
        assert date not in cleaned
        assert "肝右叶见一囊肿，大小约12mm。" in cleaned
        assert name not in cleaned


@pytest.mark.parametrize(
    "hostile",
    [
        "姓名", "张", "1", "a@", "Zhang ", " ", "医院", "1.2.", "张三/", "患者张", "12:",
        "姓名" + " " * 50,
    ],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_hostile_text_takes_no_longer_than_its_length(hostile: str) -> None:
    text = (hostile * (10**6 // len(hostile)))[: 10**6]
    assert scrub(text).text


@pytest.mark.parametrize(
    "name",
    [
        "张建国.png", "ZHANG_SAN.dcm", "chen-wei-2.jpg", "scans/李娜/1.png", "20240317_1.png",
        "E13812345678", "1.2.840.113619.2.5.17", "US20240317001", "110101199003077710",
    ],
)  # fmt: skip
def test_names_of_files_that_may_say_who_somebody_is(name: str) -> None:
    assert holds_identity(name)


@pytest.mark.parametrize(
    "name",
    ["E1", "E1/1.png", "sim-00001-1", "exam_0042.jpg", "肝脏/1.png", "LIVER_LEFT.png", "a3f9"],
)
def test_names_of_files_that_say_nothing(name: str) -> None:
    assert not holds_identity(name)
