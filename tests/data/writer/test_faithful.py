from __future__ import annotations

import pytest

from ultra.data.instructions import write_conversations
from ultra.data.writer.faithful import find_mistranslated, find_unstated
from ultra.types import FrameGroup, Turn


def report(site: str, findings: str, diagnosis: str) -> FrameGroup:
    return FrameGroup("e", "p", site, findings, diagnosis, (), (), ())


CYST = report(
    "肝脏",
    "肝右叶见一无回声区，大小约12×9mm，边界清晰，后方回声增强。余肝实质回声均匀，胆囊未见结石。",
    "肝右叶囊肿。",
)
NODULE = report(
    "甲状腺",
    "甲状腺右叶见两个低回声结节，较大者约0.85cm，边界欠清，形态不规则，内见血流信号。"
    "左叶大小正常，未见占位。",
    "甲状腺右叶结节，TI-RADS 4a类，不除外恶性。",
)
KIDNEYS = report(
    "双肾",
    "右肾见一强回声团，大小约6mm，后方伴声影。左肾见一无回声区，大小约20mm，边界清晰。",
    "右肾结石；左肾囊肿。",
)
NORMAL = report(
    "肝胆", "肝脏大小正常，回声均匀，未见占位。胆囊未见明显异常。", "肝胆未见明显异常。"
)

ABDOMEN = report(
    "肝胆胰脾",
    "肝脏形态大小正常，包膜光整，实质回声均匀，门静脉内径约11mm。肝右叶可见一大小约23×19mm的高回声团，"
    "边界清，其内未见明显血流信号。胆囊壁厚约3mm，囊内可见多个强回声团，较大者约8mm，后伴声影。"
    "胆总管内径约5mm，其内未见结石。胰腺形态正常，脾脏厚约35mm，未见异常。",
    "1.肝右叶高回声结节，考虑血管瘤可能性大；2.胆囊多发结石；3.胰脾未见明显异常。",
)
THYROID = report(
    "甲状腺",
    "左叶中部可见一低回声结节，大小约6.2×5.1mm，边界不清，形态不规则。右叶可见数个无回声结节，"
    "较大者约4×3mm，边界清。双侧颈部未见明显肿大淋巴结。",
    "甲状腺左叶结节，TI-RADS 4b类，不除外恶性；甲状腺右叶囊性结节，TI-RADS 2类。",
)
PELVIS = report(
    "妇科",
    "子宫前位，大小约52×45×40mm，肌层回声欠均匀，后壁可见一低回声结节，大小约18×16mm，边界清。"
    "左侧卵巢内可见一无回声区，大小约35×28mm，壁薄。右侧卵巢未见异常。盆腔可见游离液性暗区，深约12mm。",
    "子宫肌瘤；左侧卵巢囊肿，建议复查；盆腔少量积液。",
)
HEART = report(
    "心脏",
    "左房前后径38mm，左室舒张末内径52mm。室间隔厚约11mm。二尖瓣前叶轻度增厚，收缩期轻度反流。"
    "主动脉瓣未见反流。左室射血分数62%。",
    "左房扩大；二尖瓣轻度反流；左室收缩功能正常。",
)
FATTY = report(
    "肝脏",
    "肝脏体积增大，实质回声增强、细密，后方回声衰减，肝内管道结构显示欠清。未见占位。",
    "脂肪肝。",
)


@pytest.mark.parametrize(
    "group", [CYST, NODULE, KIDNEYS, NORMAL, ABDOMEN, THYROID, PELVIS, HEART, FATTY]
)
def test_what_the_rules_write_is_always_faithful(group):
    for seed in range(5):
        for conversation in write_conversations(group, seed):
            assert find_unstated(conversation.turns, group) == "", conversation


FAITHFUL = [
    (ABDOMEN, "胆囊里是什么？", "多发结石，较大者约8mm。"),
    (ABDOMEN, "胆总管有结石吗？", "未见结石。"),
    (ABDOMEN, "门静脉内径多少？", "约11mm"),
    (ABDOMEN, "肝脏的结节考虑什么？", "血管瘤可能性大。"),
    (THYROID, "哪一侧的结节更可疑？", "左叶结节，TI-RADS 4b类，不除外恶性。"),
    (PELVIS, "右侧卵巢如何？", "右侧卵巢未见异常。"),
    (PELVIS, "子宫有什么病变？", "子宫肌瘤，大小约1.8×1.6cm。"),
    (HEART, "射血分数是多少？", "62%"),
    (HEART, "二尖瓣有反流吗？", "有，为轻度反流。"),
    (CYST, "病变是什么？", "囊肿"),
    (CYST, "病变是什么？", "这是一个囊肿，位于肝右叶。"),
    (CYST, "病变有多大？", "12mm"),
    (CYST, "病变有多大？", "大小约1.2cm×0.9cm"),
    (CYST, "病变有多大？", "约１２毫米左右。"),
    (CYST, "病变在左还是右？", "右叶"),
    (CYST, "有没有胆囊结石？", "没有，胆囊未见结石。"),
    (CYST, "胆囊有结石吗？", "否"),
    (CYST, "结石有吗？", "未见结石"),
    (CYST, "边界是否清晰？", "是，边界清晰。"),
    (CYST, "边界模糊吗？", "不，边界清晰。"),
    (CYST, "病变后方有什么表现？", "后方回声增强。"),
    (CYST, "图像是否正常？", "否"),
    (CYST, "是否有占位？", "是的，肝右叶有占位，为囊肿。"),
    (NODULE, "右叶有几个结节？", "两个"),
    (NODULE, "右叶有几个结节？", "2个低回声结节"),
    (NODULE, "结节是单发吗？", "不是，右叶有多个结节。"),
    (NODULE, "最大的有多大？", "8.5mm"),
    (NODULE, "TI-RADS几类？", "TI-RADS 4A类"),
    (NODULE, "是恶性吗？", "不除外恶性。"),
    (NODULE, "左叶有没有占位？", "左叶未见占位。"),
    (NODULE, "左叶有结节吗？", "左叶未见结节。"),
    (NODULE, "边界清晰吗？", "不，边界欠清。"),
    (NODULE, "形态规则吗？", "否"),
    (KIDNEYS, "结石在哪侧？", "右肾"),
    (KIDNEYS, "左肾的病变有多大？", "20mm"),
    (KIDNEYS, "两侧肾脏各有什么？", "右肾结石，左肾囊肿。"),
    (NORMAL, "图像是否正常？", "是"),
    (NORMAL, "肝脏有结石吗？", "未见结石。"),
    (NORMAL, "胆囊有无异常？", "未见异常。"),
    (NORMAL, "肝脏大小如何？", "大小正常"),
]


@pytest.mark.parametrize(("group", "question", "answer"), FAITHFUL)
def test_what_the_report_says_may_be_said(group, question, answer):
    assert find_unstated((Turn("user", question), Turn("assistant", answer)), group) == ""


UNFAITHFUL = [
    (ABDOMEN, "胆总管有结石吗？", "有", "site: 胆总管 结石"),
    (ABDOMEN, "胆囊结石有多大？", "约11mm", "site: 胆囊 11mm"),
    (ABDOMEN, "肝脏的结节多大？", "8mm", "site: 肝 8mm"),
    (ABDOMEN, "肝脏的结节考虑什么？", "血管瘤。", "negation: 血管瘤"),
    (THYROID, "恶性的可能在哪侧？", "右叶不除外恶性。", "side: 右 恶性"),
    (THYROID, "左叶结节分几类？", "TI-RADS 2类", "side: 左 TI-RADS 2"),
    (THYROID, "左叶结节是什么回声？", "无回声", "side: 左 无回声"),
    (PELVIS, "右侧卵巢如何？", "右侧卵巢囊肿。", "side: 右 囊肿"),
    (PELVIS, "子宫有什么病变？", "子宫囊肿。", "site: 子宫 囊肿"),
    (HEART, "射血分数是多少？", "65%", "number: 65%"),
    (HEART, "是否有肺动脉高压？", "有肺动脉高压。", "site: 肺"),
    (FATTY, "图像是否正常？", "是", "normal: 正常"),
    (CYST, "病变有多大？", "21mm", "number: 21mm"),
    (CYST, "病变有多大？", "12cm", "number: 120mm"),
    (CYST, "病变有多大？", "约12mm，一个月前为8mm。", "number: 8mm"),
    (CYST, "病变有几个？", "两个", "number: 2个"),
    (CYST, "病变在哪侧？", "左叶", "side: 左"),
    (CYST, "病变在哪侧？", "双侧", "side: 左"),
    (CYST, "左叶的病变是什么？", "囊肿", "side: 左 囊肿"),
    (CYST, "病变是什么？", "结石", "negation: 结石"),
    (CYST, "病变是什么？", "血管瘤", "lesion: 血管瘤"),
    (CYST, "病变是什么？", "未见囊肿。", "negation: 囊肿"),
    (CYST, "有没有囊肿？", "没有", "negation: 囊肿"),
    (CYST, "胆囊有结石吗？", "有", "negation: 结石"),
    (CYST, "胆囊结石有多大？", "报告未说。", "negation: 结石"),
    (CYST, "是否有胆囊息肉？", "否", "lesion: 息肉"),
    (CYST, "回声如何？", "低回声", "echogenicity: 低回声"),
    (CYST, "边界如何？", "边界不清", "description: 不清"),
    (CYST, "边界是否清晰？", "否", "negation: 清"),
    (CYST, "性质如何？", "良性囊肿", "malignancy: 良性"),
    (CYST, "性质如何？", "未见恶性征象。", "malignancy: 恶性"),
    (CYST, "图像是否正常？", "是", "normal: 正常"),
    (CYST, "图像是否正常？", "未见异常。", "normal: 正常"),
    (CYST, "诊断是什么？", "肾囊肿", "site: 肾 囊肿"),
    (NODULE, "右叶有几个结节？", "一个结节", "number: 1个"),
    (NODULE, "有几个？", "3枚", "number: 3个"),
    (NODULE, "分类是什么？", "TI-RADS 4b类", "grade: TI-RADS 4B"),
    (NODULE, "分类是什么？", "TI-RADS 3类", "grade: TI-RADS 3"),
    (NODULE, "性质？", "恶性结节", "negation: 恶性"),
    (NODULE, "性质？", "可排除恶性。", "negation: 恶性"),
    (NODULE, "左叶有结节吗？", "有", "side: 左 结节"),
    (NODULE, "形态规则吗？", "是", "description: 规则"),
    (NODULE, "血流如何？", "内部未见血流信号。", "negation: 血流信号"),
    (KIDNEYS, "结石在哪侧？", "左肾结石", "side: 左 结石"),
    (KIDNEYS, "右肾的病变有多大？", "20mm", "side: 右 20mm"),
    (KIDNEYS, "左肾有结石吗？", "有", "side: 左 结石"),
    (KIDNEYS, "诊断是什么？", "双肾囊肿。", "side: 右 囊肿"),
    (KIDNEYS, "囊肿有积水吗？", "伴积水。", "lesion: 积水"),
    (NORMAL, "图像是否正常？", "否", "normal: 异常"),
    (NORMAL, "所见如何？", "肝内见一囊肿。", "lesion: 囊肿"),
    (NORMAL, "所见如何？", "肝脏形态正常。", "description: 形态正常"),
]


@pytest.mark.parametrize(("group", "question", "answer", "reason"), UNFAITHFUL)
def test_what_the_report_does_not_say_is_named(group, question, answer, reason):
    assert find_unstated((Turn("user", question), Turn("assistant", answer)), group) == reason


def test_every_answer_of_several_turns_is_read():
    turns = (
        Turn("user", "这是哪个部位？"), Turn("assistant", "肝脏"),
        Turn("user", "多大？"), Turn("assistant", "12mm"),
        Turn("user", "在哪侧？"), Turn("assistant", "左叶"),
    )  # fmt: skip
    assert find_unstated(turns[:4], CYST) == ""
    assert find_unstated(turns, CYST) == "side: 左"


TRANSLATED = [
    ("A 1.2 x 0.9 cm cyst in the right lobe.", "右叶见一12×9mm囊肿。"),
    ("There are 2 stones in the left kidney.", "左肾内有两枚结石。"),
    ("Two nodules, the larger 8 by 6 mm.", "两个结节，较大者8×6毫米。"),
    ("Both kidneys are normal.", "双肾正常。"),
    ("Bilateral pleural effusion.", "双侧胸腔积液。"),
    ("No stone is seen in the gallbladder.", "胆囊内未见结石。"),
    ("The margin is irregular and indistinct.", "边缘不规则，边界不清。"),
    ("An anechoic lesion", "无回声病变"),
    ("No", "否"),
    ("12 mm", "12毫米"),
    ("a 1,200 ml effusion", "1200毫升积液"),
    ("Likely malignant.", "可能为恶性。"),
    ("A 45-year-old man", "一名45岁男性"),
    ("What is shown?", "图中显示了什么？"),
]


@pytest.mark.parametrize(("english", "chinese"), TRANSLATED)
def test_a_true_translation_passes(english, chinese):
    assert find_mistranslated(english, chinese) == ""


MISTRANSLATED = [
    ("A 1.2 cm cyst", "1.2mm囊肿", "number: 1.2mm、12mm"),
    ("A 12 mm cyst", "一个囊肿", "number: 12mm"),
    ("A cyst", "12mm囊肿", "number: 12mm"),
    ("Two nodules", "三个结节", "number: 3"),
    ("The right kidney", "左肾", "side: 右、左"),
    ("The right kidney", "肾脏", "side: 右"),
    ("The kidney", "双肾", "side: 右、左"),
    ("No stone is seen.", "可见结石。", "negation: lost"),
    ("A stone is seen.", "未见结石。", "negation: added"),
    ("Benign nodule", "结节", "malignancy: 良性"),
    ("A nodule", "恶性结节", "malignancy: 恶性"),
    ("The liver is normal.", "The liver is normal.", "language: not Chinese"),
]


@pytest.mark.parametrize(("english", "chinese", "reason"), MISTRANSLATED)
def test_a_false_translation_is_named(english, chinese, reason):
    assert find_mistranslated(english, chinese) == reason
